"""A loss that no longer falls although there is somewhere to go."""

import numpy as np

from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._trend import median, smooth

# √(π/2): standard error of a median of normal values, relative to that of a mean.
_ERROR_OF_MEDIAN = (np.pi / 2) ** 0.5


def plateau(history: History) -> Finding | None:
    """A loss that is flat for long, and that has not converged.

    Flat is also a run that is done. It is told apart by a loss that is still about
    where it started, or by gradients that still agree from step to step.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    judged = history.undecayed() & np.isfinite(loss.values)
    judged &= np.arange(history.length) >= history.settled()
    rows = np.flatnonzero(judged)
    if len(rows) < limits.PLATEAU_WINDOW:
        return None
    values = loss.values[rows]
    quarter = len(rows) // 4
    early, late = median(values[:quarter]), median(values[-quarter:])
    noise = limits.SIGMA_PER_MAD * median(np.abs(values - smooth(values)))
    error = _ERROR_OF_MEDIAN * noise * (2 / quarter) ** 0.5
    negligible = limits.PLATEAU_FALL * abs(early)
    if early - late > max(limits.PLATEAU_ERRORS * error, negligible):
        return None
    reason = _not_done(history, loss.values, float(late), rows)
    if reason is None:
        return None
    evidence = (
        f"loss {early:.4g} in the first and {late:.4g} in the last quarter of "
        f"{len(rows)} steps: {late - early:+.2g} ± {error:.1g}; {reason}"
    )
    return finding("plateau", history, int(rows[0]), loss.key, None, evidence)


def _not_done(
    history: History, loss: np.ndarray, late: float, rows: np.ndarray
) -> str | None:
    """Why a flat loss is not a converged one, if it is not."""
    start = median(loss[: limits.CENTRE])
    began = history.steps[0] <= limits.EARLY_STEPS
    if began and start - late < limits.PLATEAU_FALLEN * abs(start):
        return (
            f"it began at {start:.4g} and fell by less than {limits.PLATEAU_FALLEN:.0%}"
        )
    rho = history.first("adam/correlation")
    if rho is None:
        return None
    level = median(rho.values[rows])
    if level < limits.PLATEAU_CORRELATION:
        return None
    return f"gradients still agree, with a correlation of {level:.2f}"
