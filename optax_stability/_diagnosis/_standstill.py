"""A loss that stands still: exactly, or without having converged."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import Advice, finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History, resolution
from optax_stability._diagnosis._windows import median, smooth

# √(π/2): standard error of a median of normal values, relative to that of a mean.
_ERROR_OF_MEDIAN = (np.pi / 2) ** 0.5


def plateau(history: History) -> Finding | None:
    """A loss that is flat for many steps without having converged.

    A converged loss is also flat. The loss has not converged if it is still near its
    initial value, or if successive gradients are still correlated.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    if found := plateau_far_above(history):
        return found
    judged = history.near_peak_rate() & np.isfinite(loss.values)
    judged &= np.arange(history.length) >= history.settled_row()
    rows = np.flatnonzero(judged)
    if len(rows) < limits.PLATEAU_WINDOW:
        return None
    values = loss.values[rows]
    quarter = len(rows) // 4
    early, late = median(values[:quarter]), median(values[-quarter:])
    noise = limits.SIGMA_PER_MAD * median(np.abs(values - smooth(values)))
    error = _ERROR_OF_MEDIAN * noise * (2 / quarter) ** 0.5
    negligible = limits.PLATEAU_NEGLIGIBLE * abs(early)
    if early - late > max(limits.PLATEAU_ERRORS * error, negligible):
        return None
    reason = _why_not_converged(history, loss.values, float(late), rows)
    if reason is None:
        return None
    evidence = (
        f"loss {early:.4g} in the first and {late:.4g} in the last quarter of "
        f"{len(rows)} steps: {late - early:+.2g} ± {error:.1g}; {reason}"
    )
    return finding("plateau", history, int(rows[0]), loss.key, None, evidence)


def loss_stuck(history: History) -> Finding | None:
    """A loss of exactly the same value until the end.

    Zero is always one. Another value may be repeated by a log that rounds: the decimal
    places of all values tell whether it does.
    """
    loss = loss_of(history)
    if loss is None or loss.key == "skip/value":
        return None
    rows = np.flatnonzero(np.isfinite(loss.values))
    values = loss.values[rows]
    if not len(rows):
        return None
    differs = np.flatnonzero(values != values[-1])
    start = int(differs[-1]) + 1 if len(differs) else 0
    count = len(values) - start
    share = max(limits.STUCK_ROWS, limits.STUCK_SHARE * len(values))
    if count < min(share, limits.STUCK_ALWAYS):
        return None
    value = values[-1]
    if value and start and resolution(values) > abs(value) / limits.STUCK_RESOLUTION:
        return None
    row = int(rows[start])
    evidence = (
        f"the loss is exactly {value:.6g} in the last {count} of {len(values)} rows, "
        f"from step {history.steps[row]:.0f} on"
    )
    return finding("loss_stuck", history, row, loss.key, None, evidence)


def plateau_far_above(history: History) -> Finding | None:
    """A loss that begins above any guess, falls, and stays flat far above the rest.

    Whoever guesses pays the logarithm of the size of the vocabulary. A model that pays
    more is sure of what is wrong: labels that do not belong to their inputs, or another
    unit than nats. Where such a run should be is not in its log, so this is a guess.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    values = loss.values[np.isfinite(loss.values)]
    quarter = len(values) // 4
    if quarter < limits.CENTRE:
        return None
    start = median(values[: limits.MIN_MEASUREMENTS])
    early, late = median(values[quarter : 2 * quarter]), median(values[-quarter:])
    flat = abs(early - late) <= limits.FAR_FLAT * abs(late)
    fell = late <= start / 2
    if not (start > limits.HIGHEST_LOSS and fell and flat and late >= limits.FAR_LEVEL):
        return None
    rows = np.flatnonzero(np.isfinite(loss.values))
    flat_from = int(np.argmax(values <= early))
    evidence = (
        f"the loss begins at {start:.3g}, above the {limits.HIGHEST_LOSS} nats of a "
        f"guess among 256,000 tokens, and is flat since: {early:.4g} in the second and "
        f"{late:.4g} in the last quarter of {len(values)} rows; how low it should be "
        "cannot be told from this log"
    )
    likelier = Advice(
        (
            "labels that do not match the inputs: shuffled, shifted, or of another "
            "tokenizer",
            "or no fault at all, if the loss is a sum, or not in nats",
        ),
        (),
    )
    return finding(
        "plateau", history, int(rows[flat_from]), loss.key, None, evidence, likelier
    )


def _why_not_converged(
    history: History, loss: np.ndarray, late: float, rows: np.ndarray
) -> str | None:
    """The evidence that a flat loss has not converged; None without any."""
    start = median(loss[: limits.CENTRE])
    began = history.steps[0] <= limits.EARLY_STEPS
    if began and start - late < limits.PLATEAU_MIN_FALL * abs(start):
        return (
            f"it began at {start:.4g} and fell by less than "
            f"{limits.PLATEAU_MIN_FALL:.0%}"
        )
    rho = history.first("adam/correlation")
    if rho is None:
        return None
    level = median(rho.values[rows])
    if level < limits.PLATEAU_CORRELATION:
        return None
    return f"successive gradients still have a correlation of {level:.2f}"
