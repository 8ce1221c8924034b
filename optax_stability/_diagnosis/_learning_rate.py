"""A learning rate that is too high, found before the loss shows it, or that is 0."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import median, stretches


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


def learning_rate_zero(history: History) -> Finding | None:
    """A learning rate of exactly 0 in much of the run, while the loss does not fall.

    A log may round a small rate to 0: then the loss falls all the same.
    """
    rate = history.first_unprefixed("learning_rate")
    if rate is None:
        return None
    rows = np.flatnonzero(np.isfinite(rate.values))
    longest = max(
        stretches(rate.values[rows] == 0),
        key=lambda each: each[1] - each[0],
        default=None,
    )
    if longest is None:
        return None
    start, stop = longest
    count = stop - start
    if count < max(limits.ZERO_RATE_ROWS, limits.ZERO_RATE_SHARE * len(rows)):
        return None
    if _falls(history, rows[start:stop]):
        return None
    evidence = (
        f"the learning rate is 0 in {count} rows in a row of {len(rows)}, from step "
        f"{history.steps[rows[start]]:.0f} to {history.steps[rows[stop - 1]]:.0f}; "
        f"largest in the log: {np.max(rate.values[rows]):.3g}"
    )
    row = int(rows[start])
    return finding("learning_rate_zero", history, row, rate.key, None, evidence)


def _falls(history: History, rows: np.ndarray) -> bool:
    """Whether the loss falls over some rows by more than its scatter."""
    loss = loss_of(history)
    values = np.zeros(0) if loss is None else loss.values[rows]
    values = values[np.isfinite(values)]
    quarter = max(len(values) // 4, 1)
    if len(values) < limits.ZERO_RATE_ROWS:
        return False
    early, late = values[:quarter], values[-quarter:]
    scatter = limits.SIGMA_PER_MAD * median(np.abs(late - median(late)))
    return bool(median(early) - median(late) > 3 * scatter)
