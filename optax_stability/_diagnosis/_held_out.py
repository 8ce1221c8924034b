"""A held-out loss that rises while the training loss still falls."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import finite, median

HELD_OUT = "eval/loss"


def overfitting(history: History) -> Finding | None:
    """A held-out loss above its lowest value for good, while the training loss fell.

    The rise must exceed the noise of the held-out loss, which is measured around its
    trend, and every evaluation after the first abnormal one must confirm it.
    """
    held_out, loss = history.first_unprefixed(HELD_OUT), loss_of(history)
    if held_out is None or loss is None:
        return None
    rows = np.flatnonzero(np.isfinite(held_out.values))
    values = held_out.values[rows]
    if len(rows) < limits.MIN_MEASUREMENTS:
        return None
    best = int(np.argmin(values))
    few = len(values) < limits.CENTRE
    share = limits.OVERFIT_SHARE_OF_FEW if few else limits.OVERFIT_SHARE
    limit = max(limits.OVERFIT_SCALES * _noise(values), share * abs(values[best]))
    above = values > values[best] + limit
    above[: best + 1] = False
    start = int(np.flatnonzero(~above)[-1]) + 1
    count = len(values) - start
    if not count:
        return None
    # A single evaluation has to be far above.
    if count < limits.MIN_MEASUREMENTS and values[-1] < values[best] + 2 * limit:
        return None
    before, after = _training_around(finite(loss.values), rows[best], rows[start])
    if not after < before:
        return None
    evidence = (
        f"held-out loss {values[best]:.4g} at step {history.steps[rows[best]]:.0f}, "
        f"its lowest, and {values[-1]:.4g} at the end: "
        f"{values[-1] - values[best]:+.2g}, limit {limit:+.2g}, in each of the last "
        f"{count} evaluations; the training "
        f"loss fell from {before:.4g} to {after:.4g} meanwhile"
    )
    return finding(
        "overfitting", history, int(rows[start]), held_out.key, None, evidence
    )


def _noise(values: np.ndarray) -> float:
    """σ of the evaluations around a curve that bends evenly."""
    if len(values) < limits.CENTRE:
        return 0.0
    bend = values[1:-1] - (values[:-2] + values[2:]) / 2
    # The variance of this is one and a half times that of a value. Theory.
    scatter = median(np.abs(bend - median(bend)))
    return float(limits.SIGMA_PER_MAD * scatter / 1.5**0.5)


def _training_around(loss: np.ndarray, best: int, start: int) -> tuple[float, float]:
    """Training loss around the lowest held-out loss, and from the rise on."""
    known = np.flatnonzero(~np.isnan(loss))
    at = int(np.searchsorted(known, best))
    before = known[max(at - limits.CENTRE, 0) : at + limits.CENTRE // 2]
    after = known[known >= start][-2 * limits.CENTRE :]
    if not len(after):
        after = known[-limits.CENTRE :]
    return float(median(loss[before])), float(median(loss[after]))
