"""A loss that stands still without having converged."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._trend import median, smooth

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
