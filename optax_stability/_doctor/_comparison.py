"""Where two runs part: the first step at which they differ by more than their noise.

*Rule*, for the difference d of loss (or of log norm) at steps that both runs have::

  level   median of the last 8 d
  noise   σ of d around its trend until then, or that of two independent runs, if it is
          less; over √8, times √(π/2) for a median
  parted  |level| > 4 noise and 0.5 % of the loss (10 % of the norm), from there on

Runs that saw the same batches share much of their noise, which d does not have.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._normal import levels, spread
from optax_stability._diagnosis._series import log_of
from optax_stability._diagnosis._windows import median, stretches

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
    both = run, other
    if key == "grad/norm":
        both = log_of(run), log_of(other)
        difference = both[0] - both[1]
        floor = np.full(len(steps), np.log1p(_NORM_SHARE))
    else:
        difference = run - other
        floor = _LOSS_SHARE * np.abs(levels(other))
    difference = np.nan_to_num(difference)
    noise = np.fmin(_noise_so_far(difference), _noise_of_both(*both))
    level = levels(difference)
    level[:2] = difference[:2]
    apart = np.abs(level) > np.maximum(_ERRORS * _ERROR_OF_MEDIAN * noise, floor)
    least = max(len(steps) // _LASTING, limits.MIN_MEASUREMENTS)
    for start, stop in stretches(apart, limits.CENTRE):
        enough = limits.MIN_MEASUREMENTS if stop == len(steps) else least
        if stop - start < enough:
            continue
        # The median lags; the single values do not.
        near = slice(max(start + 1 - limits.CENTRE, 0), start + 1)
        single = np.abs(difference) > np.maximum(_ERRORS * noise, floor)
        first = near.start + int(single[near].argmax()) if single[near].any() else start
        at = min(start + limits.CENTRE // 2, stop - 1)
        pair = float(levels(run)[at]), float(levels(other)[at])
        return Parting(key, int(steps[first]), *pair, len(steps))
    pair = float(levels(run)[-1]), float(levels(other)[-1])
    return Parting(key, None, *pair, len(steps))


def _noise_of_both(run: np.ndarray, other: np.ndarray) -> float:
    """σ of the difference of independent runs: of a run that left, at its calmest."""
    quartile = np.nanquantile(_known(spread(np.nan_to_num(run))), 0.25)
    usual = np.nanmedian(_known(spread(np.nan_to_num(other))))
    return float(np.hypot(quartile, usual))


def _known(values: np.ndarray) -> np.ndarray:
    """The values that are known; ∞ if there are none."""
    values = values[np.isfinite(values)]
    return values if len(values) else np.array([np.inf])


def _noise_so_far(difference: np.ndarray) -> np.ndarray:
    """Median of the noise in all rows until shortly before each; ∞ if unknown.

    Runs that were equal so far have none, from the first row on.
    """
    noise = spread(difference)
    found = np.full(len(difference), np.inf)
    equal = np.maximum.accumulate(np.abs(difference)) == 0
    found[:-1][equal[:-1]] = 0.0
    found[1:][equal[:-1]] = 0.0
    # The median changes slowly: it is computed in a few rows.
    for row in np.unique(
        np.geomspace(2 * limits.CENTRE, max(len(noise), 2 * limits.CENTRE), 60)
    ).astype(int):
        found[row:] = median(noise[: row - limits.CENTRE + 1])
    return np.where(equal, 0.0, found)
