"""Where two runs part: the first step at which they differ by more than their noise.

*Rule*, for the difference d of loss (or of log norm) at steps that both runs have::

  level   median of the last 8 d
  noise   σ of d around its trend, over √8, times √(π/2) for a median
  parted  |level| > 4 noise and 0.5 % of the loss (10 % of the norm), from there on

Runs that saw the same batches share much of their noise, which d does not have.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._normal import levels, spread
from optax_stability._diagnosis._series import log_of
from optax_stability._diagnosis._windows import stretches

_ERRORS, _LOSS_SHARE, _NORM_SHARE = 4.0, 0.005, 0.1
_ERROR_OF_MEDIAN = (np.pi / 2 / limits.CENTRE) ** 0.5
# They stay apart for this share of the common rows, or to the end.
_LASTING = 8


class Parting(NamedTuple):
    """How two runs compare in one metric.

    Attributes:
      metric: name in the history.
      step: the first step at which they differ for good; None if they do not.
      run: the level of the run there, or at the end.
      other: that of the baseline.
      common: number of steps compared.
    """

    metric: str
    step: int | None
    run: float
    other: float
    common: int

    def __str__(self) -> str:
        """One line."""
        name = {"loss": "loss", "grad/norm": "gradient norm"}[self.metric]
        both = f"{self.run:.4g} against {self.other:.4g}"
        if not self.common:
            return f"{name}: no step in common"
        if self.step is None:
            return (
                f"{name}: no difference beyond noise in {self.common} common steps "
                f"({both} at the end)"
            )
        return f"{name}: apart from step {self.step} on ({both} there)"


def compare(run: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[Parting]:
    """Where a run leaves a baseline, for each metric that both have."""
    both = [key for key in ("loss", "grad/norm") if key in run and key in other]
    return [_parting(key, *_common(key, run, other)) for key in both]


def _common(
    key: str, run: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, values, values of the other) where both are known.

    If they were logged at different steps, the baseline is interpolated.
    """
    curves = []
    for history in (run, other):
        known = np.isfinite(history[key])
        steps, at = np.unique(history["step"][known], return_index=True)
        curves.append((steps, history[key][known][at]))
    (steps, values), (theirs, baseline) = curves
    shared = np.isin(steps, theirs)
    if shared.sum() < min(limits.CENTRE, len(steps)) and len(theirs):
        shared = (steps >= theirs[0]) & (steps <= theirs[-1])
    if not len(theirs):
        shared = np.zeros(len(steps), bool)
    steps, values = steps[shared], values[shared]
    if not len(steps):
        return steps, values, values
    return steps, values, np.interp(steps, theirs, baseline)


def _parting(
    key: str, steps: np.ndarray, run: np.ndarray, other: np.ndarray
) -> Parting:
    if not len(steps):
        return Parting(key, None, np.nan, np.nan, 0)
    if key == "grad/norm":
        difference = log_of(run) - log_of(other)
        floor = np.full(len(steps), np.log1p(_NORM_SHARE))
    else:
        difference = run - other
        floor = _LOSS_SHARE * np.abs(levels(other))
    difference = np.nan_to_num(difference)
    level = levels(difference)
    level[:2] = difference[:2]
    noise = np.nan_to_num(spread(difference)) * _ERROR_OF_MEDIAN
    # Later noise is not that of a run that has left: the least so far.
    calm = np.minimum.accumulate(np.where(noise > 0, noise, np.inf))
    limit = np.maximum(_ERRORS * np.where(np.isfinite(calm), calm, 0.0), floor)
    least = max(len(steps) // _LASTING, limits.MIN_MEASUREMENTS)
    last_run, last_other = levels(run)[-1], levels(other)[-1]
    for start, stop in stretches(np.abs(level) > limit, limits.CENTRE):
        enough = limits.MIN_MEASUREMENTS if stop == len(steps) else least
        if stop - start >= enough:
            at = min(start + limits.CENTRE // 2, stop - 1)
            return Parting(
                key,
                int(steps[start]),
                float(levels(run)[at]),
                float(levels(other)[at]),
                len(steps),
            )
    return Parting(key, None, float(last_run), float(last_other), len(steps))
