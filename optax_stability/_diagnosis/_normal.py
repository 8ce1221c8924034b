"""What is normal for a curve so far: its level and its noise, in every row.

*Problem*: a median of recent values lags a steep descent, needs many rows before it
says anything, and follows what grows by and by until that counts as normal.

*Rule*, for the measured values x₀, x₁, … of one curve, with windows counted in
measurements, so that a row may stand for one step or for fifty::

  mᵢ  median of the last 8 values, fewer at the start; of the first two, the larger
  σᵢ  the largest of two spreads of the last 32 measurements before i, and the median
      of the first one over the last four windows of 32:
      1.4826·median |xⱼ − median of the nine values around j|   noise around a trend
      upper quartile of xⱼ − mⱼ₋₁, over 0.6745                  upward surprise
  recent level    the lower of m before, and m eight earlier    for what jumps
  level so far    lowest m of all earlier measurements          for what lasts

A median of the nine values *around* a row does not lag a slope, and a curve that falls
does not surprise upwards: a steep descent is no noise. The lowest level remembers what
was healthy: a slow rise is measured from where it began, and no abnormal level is
learned. Until 24 measurements are known, limits are wider.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._windows import finite, median, trailing

# Half of the window around a row.
_HALF = 4
# Rows between windows that share no value.
_LAGS = tuple(limits.WINDOW * i for i in (1, 2, 3))


class Normal(NamedTuple):
    """What was normal before each row, and the value relative to it; [T].

    Attributes:
      level: the recent level.
      noise: σ around the trend.
      excess: value minus level; NaN where either is unknown.
      caution: from 0, once enough is known, to 1, if next to nothing is.
    """

    level: np.ndarray
    noise: np.ndarray
    excess: np.ndarray
    caution: np.ndarray

    def bound(self, scales: float, floor: float | np.ndarray) -> np.ndarray:
        """Limit of the excess: so many σ, and at least ``floor``; ∞ if unknown."""
        return bound(self.noise, self.caution, scales, floor)

    def above(self, scales: float, floor: float) -> np.ndarray:
        """bool[T]: the excess is above its limit."""
        return self.excess > self.bound(scales, floor)


def bound(noise, caution, scales: float, floor):
    """The larger of ``floor`` and so many σ; wider while few measurements are known."""
    wider = 1 + limits.EARLY_WIDENING * caution
    limit = np.maximum(scales * noise, floor) * wider
    return np.where(np.isnan(limit), np.inf, limit)


def caution(known: np.ndarray) -> np.ndarray:
    """From 1, if fewer than three measurements are known, to 0 from 24 on."""
    least, most = limits.MIN_MEASUREMENTS, limits.WARMUP_VALUES
    return np.clip((most - known) / (most - least), 0.0, 1.0)


def levels(values: np.ndarray) -> np.ndarray:
    """Median of the last 8 of finite ``values[n]``; of the first two, the larger."""
    found = median(trailing(values, limits.CENTRE), axis=1)
    found[:2] = np.maximum.accumulate(values[:2])
    return found


def spread(values: np.ndarray) -> np.ndarray:
    """σ of finite ``values[n]``, for each from the values before it; NaN if unknown."""
    count = len(values)
    around = np.pad(values, _HALF, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(around, 2 * _HALF + 1)
    residual = np.abs(values - median(around, axis=1))
    # The window around a row ends four rows later.
    known = np.full(count, np.nan)
    known[_HALF + 1 :] = residual[: max(count - _HALF - 1, 0)]
    noise = limits.SIGMA_PER_MAD * median(trailing(known, limits.WINDOW), axis=1)
    # Until there are enough of those: from differences, about their median.
    change = np.full(count, np.nan)
    change[2:] = np.diff(values)[:-1]
    early = min(count, limits.WARMUP_VALUES)
    for i in range(early):
        before = change[: i + 1]
        noise[i] = (
            limits.SIGMA_PER_MAD
            * np.sqrt(0.5)
            * median(np.abs(before - median(before)))
        )
    # 32 values give σ to a fifth: the median of four such windows is surer.
    lags = (np.concatenate([np.full(lag, np.nan), noise])[:count] for lag in _LAGS)
    usual = median(np.stack([noise, *lags]), axis=0)
    return np.fmax(np.fmax(noise, usual), _surprise(values))


def _surprise(values: np.ndarray) -> np.ndarray:
    """Upper quartile of each value minus the level before it, as a σ; not below 0."""
    known = np.full(len(values), np.nan)
    known[2:] = values[1:-1] - levels(values)[:-2]
    window = np.sort(trailing(known, limits.WINDOW), axis=1)
    count = np.sum(~np.isnan(window), axis=1)
    at = np.maximum(np.ceil(0.75 * count).astype(int) - 1, 0)
    quartile = np.take_along_axis(window, at[:, None], axis=1)[:, 0]
    return np.maximum(quartile, 0.0) / limits.SIGMA_PER_QUARTILE


def normal(values: np.ndarray) -> Normal:
    """What is normal for ``values[T]``; rows that are not finite are left out."""
    values = finite(values)
    rows = np.flatnonzero(~np.isnan(values))
    found = np.full((3, len(values)), np.nan)
    careful = np.ones(len(values))
    if len(rows):
        known = values[rows]
        level = np.concatenate([[np.nan], levels(known)[:-1]])
        level[1:2] = np.nan  # A first value alone may be any number.
        earlier = np.concatenate([np.full(limits.CENTRE, np.nan), level])
        level = np.fmin(level, earlier[: len(level)])
        found[:, rows] = level, spread(known), known - level
        careful[rows] = caution(np.arange(len(rows)))
        # What is known of one or two values is next to nothing.
        found[1, rows[: limits.MIN_MEASUREMENTS]] = np.nan
    return Normal(found[0], found[1], found[2], careful)


class Base(NamedTuple):
    """The lowest level so far, for each of the finite values of a curve; [n].

    Attributes:
      level: the lowest level before, in units of the curve.
      noise: σ when the level was the lowest; NaN if it was not known.
      known: measurements at that time.
    """

    level: np.ndarray
    noise: np.ndarray
    known: np.ndarray


def base(values: np.ndarray, growth: float = 0.0, first_is_known: bool = False) -> Base:
    """The lowest level before each of finite ``values[n]``.

    Args:
      values: the measurements.
      growth: how fast a healthy level may rise: in proportion to this power of the
        number of measurements, if the values are logarithms.
      first_is_known: whether the first value alone is a level; without other evidence
        it may be any number.
    """
    count = np.arange(len(values))
    level = levels(values)
    if len(values) and not first_is_known:
        level[0] = np.inf
    # In logarithms, a level that grows like n^growth is constant in these units.
    drift = growth * np.log(count + limits.CENTRE)
    level = level - drift
    lowest = np.minimum.accumulate(level)
    at = np.maximum.accumulate(np.where(level <= lowest, count, 0))
    before = np.concatenate([[0], at[:-1]]) if len(values) else at
    # The level lags: a rise has begun before the level is at its lowest. The noise is
    # that of shortly before.
    noise = np.append(spread(values), np.nan)
    noise = np.fmin.reduce(trailing(noise, limits.CENTRE), axis=1)[before + 1]
    return Base(level[before] + drift, noise, before + 1)
