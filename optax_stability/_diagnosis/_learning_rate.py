"""A learning rate that is too high, found before the loss shows it."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History


def learning_rate_too_high(history: History) -> Finding | None:
    """ρ̂ far below 0 after the warm-up, as if successive gradients were opposed.

    A negative ρ̂ means that Adam's update is smaller than independent gradients would
    make it. A second moment that still contains larger, older gradients has the same
    effect. The rule needs a history that begins before the end of the warm-up, because
    it was never tested on later parts of a run. If there are several parameter groups,
    all of them must be below the limit.
    """
    start = _start(history)
    groups = history.find_all("adam/correlation")
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
    """The first row after the warm-up; None if the history begins after the warm-up.

    Not before step ``RATE_FROM_STEP``, because after a short warm-up the moments still
    contain the first gradients.
    """
    peak = history.peak_rate_row()
    if peak:
        return max(peak, int(np.searchsorted(history.steps, limits.RATE_FROM_STEP)))
    if not history.length or history.steps[0] > limits.EARLY_STEPS:
        return None
    return history.settled_row()
