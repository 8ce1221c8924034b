"""A learning rate that is too high, before the loss shows it."""

import numpy as np

from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History


def learning_rate_too_high(history: History) -> Finding | None:
    """A ρ̂ far below 0 after the warm-up: as if successive gradients were opposed.

    It says that Adam's update is smaller than independent gradients would make it, and
    that is also so where the second moment remembers larger ones.
    Only what begins before the end of the warm-up can tell: the rule was never tried
    on later parts of a run. Of several groups of parameters, all must agree.
    """
    start = _start(history)
    groups = history.streams("adam/correlation")
    if start is None or not groups:
        return None
    medians, rows = [], np.zeros(0, int)
    for group in groups:
        rows = start + np.flatnonzero(
            history.measured(group.key, "adam/correlation")[start:]
        )
        rows = rows[: limits.RATE_MEASUREMENTS]
        if len(rows) < limits.RATE_MEASUREMENTS:
            return None
        medians.append(float(np.median(group.values[rows])))
    if max(medians) >= limits.RATE_CORRELATION:
        return None
    evidence = (
        f"correlation of successive gradients {max(medians):+.2f} (median of "
        f"{len(rows)} measurements, steps {history.steps[rows[0]]} to "
        f"{history.steps[rows[-1]]}, after the warm-up), limit "
        f"{limits.RATE_CORRELATION:g}"
    )
    return finding(
        "learning_rate_too_high", history, int(rows[0]), groups[0].key, None, evidence
    )


def _start(history: History) -> int | None:
    """The first row after a warm-up that the history has seen; None otherwise.

    After a short one not at once: the moments are still those of the first steps.
    """
    peak = history.peak_rate()
    if peak:
        return max(peak, int(np.searchsorted(history.steps, limits.RATE_FROM_STEP)))
    if not history.length or history.steps[0] > limits.EARLY_STEPS:
        return None
    return history.settled()
