"""The loss that a guard is given: whether it is one at all."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History, Series, log_of, resolution
from optax_stability._diagnosis._windows import median


def guard_loss_constant(history: History) -> Finding | None:
    """A guard that is given the same number at every step, in place of the loss."""
    for value in history.find_all("skip/value"):
        if not _is_no_loss(history, value):
            continue
        rows = np.flatnonzero(~np.isnan(value.values))
        norm = history.columns[_beside(value, "norm")][rows]
        norm = norm[np.isfinite(norm)]
        evidence = (
            f"the guard was given the loss {value.values[rows[0]]:.6g} in all "
            f"{len(rows)} rows, while the gradient norm went from {norm.min():.3g} to "
            f"{norm.max():.3g}; its limit is {_last_limit(history, value):.3g}"
        )
        step = int(rows[0])
        return finding("guard_loss_constant", history, step, value.key, None, evidence)
    return None


def stands_for_the_loss(history: History, loss: Series) -> bool:
    """Whether these numbers are what a guard was given in place of the loss."""
    return any(
        np.array_equal(loss.values, value.values, equal_nan=True)
        and _is_no_loss(history, value)
        for value in history.find_all("skip/value")
    )


def _beside(value: Series, name: str) -> str:
    """The key of another metric of the same guard."""
    return value.key.removesuffix("value") + name


def _last_limit(history: History, value: Series) -> float:
    limit = history.columns[_beside(value, "value_limit")]
    return float(limit[np.isfinite(limit)][-1])


def _is_no_loss(history: History, value: Series) -> bool:
    """Whether a guard judges a loss that never changes, unlike the gradient.

    A guard without a loss shows 0, and has no limit. A log that rounds says nothing. Of
    a number other than 0 the first rows must be there, and many: a loss that has
    converged can be the same for long, and so can a new one in 16 bits.
    """
    limit = history.columns.get(_beside(value, "value_limit"))
    norm = history.columns.get(_beside(value, "norm"))
    if limit is None or norm is None or not np.isfinite(limit).any():
        return False
    rows = np.flatnonzero(~np.isnan(value.values) & np.isfinite(norm))
    values = value.values[~np.isnan(value.values)]
    if len(rows) < limits.WARMUP_VALUES or np.any(values != values[0]):
        return False
    norm = norm[rows]
    varies = median(np.abs(np.diff(log_of(norm)))) >= limits.NORM_VARIES
    if not varies or resolution(norm):
        return False
    if values[0] == 0:
        return bool(median(norm) >= limits.NORM_AT_ZERO_LOSS)
    began = history.steps[0] <= limits.EARLY_STEPS
    return bool(began and len(rows) >= limits.STUCK_ALWAYS)
