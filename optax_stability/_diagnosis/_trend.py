"""Distance of a curve from the median of its recent values, in every row.

*Rule*: that of ``thresholds.detrended_mad``, for many curves at once and in NumPy::

  c = median of the last 8 values     e = x − c
  s = 1.4826·median|e − median e| of the last 32
  abnormal if e > max(scales·s, floor)
  learned value: min(x, c + max(scales·s, floor))

Abnormal values are clipped before they are learned, a falling curve is followed, and
non-finite values are not learned.
"""

import math
from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits


class Trend(NamedTuple):
    """Recent level of curves, and each value relative to it; [T] or [T, n].

    Attributes:
      centre: median of the recent values.
      scale: robust σ around the centre.
      excess: value minus centre; NaN where either is unknown.
      bound: limit of the excess; ∞ until enough values are known.
    """

    centre: np.ndarray
    scale: np.ndarray
    excess: np.ndarray
    bound: np.ndarray

    @property
    def above(self) -> np.ndarray:
        """Whether the excess is above its bound."""
        return self.excess > self.bound


def median(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Median of the values that are not NaN; NaN if there are none."""
    if not values.shape[axis]:
        return np.full(np.delete(values.shape, axis), np.nan)
    values = np.sort(values, axis=axis)
    count = np.sum(~np.isnan(values), axis=axis, keepdims=True)
    low, high = (
        np.take_along_axis(values, at, axis=axis)
        for at in (np.maximum(count - 1, 0) // 2, count // 2)
    )
    return np.squeeze(low / 2 + high / 2, axis=axis)


def finite(values: np.ndarray) -> np.ndarray:
    """The values, with NaN in place of non-finite ones."""
    return np.where(np.isfinite(values), values, np.nan)


def _push(ring: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The ring buffer after finite values are pushed, in each column separately."""
    pushed = np.concatenate([ring[1:], values[None]])
    return np.where(np.isfinite(values), pushed, ring)


def trend(values: np.ndarray, scales: float, floor: float) -> Trend:
    """The trend of ``values[T]`` or ``values[T, n]``."""
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    flat, shape = finite(flat), flat.shape
    centre, scale, excess, bound = (np.full(shape, np.nan) for _ in range(4))
    recent = np.full((limits.CENTRE, shape[1]), np.nan)
    residuals = np.full((limits.WINDOW, shape[1]), np.nan)
    for i, x in enumerate(flat):
        centre[i] = median(recent)
        scale[i] = limits.SIGMA_PER_MAD * median(np.abs(residuals - median(residuals)))
        # The first of the warm-up values has no centre, and so no residual.
        armed = np.isfinite(residuals[1 - limits.WARMUP_VALUES])
        bound[i] = np.where(armed, np.maximum(scales * scale[i], floor), np.inf)
        excess[i] = x - centre[i]
        learned = np.fmin(x, centre[i] + bound[i])
        learned = np.where(np.isnan(x), np.nan, learned)
        residuals = _push(residuals, learned - centre[i])
        recent = _push(recent, learned)
    return Trend(
        *(each.reshape(values.shape) for each in (centre, scale, excess, bound))
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Trailing median of ``CENTRE`` values, fewer at the start; [T] or [T, n]."""
    if not values.size:
        return values
    flat = finite(values.reshape(len(values), -1))
    padding = np.full((limits.CENTRE - 1, flat.shape[1]), np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.concatenate([padding, flat]), limits.CENTRE, axis=0
    )
    return median(windows, axis=-1).reshape(values.shape)


def stretches(flags: np.ndarray, max_distance: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of stretches of flags, merged if at most ``max_distance`` apart."""
    at = np.flatnonzero(flags)
    if not len(at):
        return []
    breaks = np.flatnonzero(np.diff(at) > max_distance)
    starts = at[np.concatenate([[0], breaks + 1])]
    stops = at[np.concatenate([breaks, [len(at) - 1]])] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def sustained(flags: np.ndarray, measured: np.ndarray, rows: int = 1) -> int | None:
    """The first row of the first stretch of flags that lasts; None if none does.

    A stretch lasts if it has at least ``rows`` rows, and at least ``MIN_MEASUREMENTS``
    new values, which ``measured`` marks.
    """
    for start, stop in stretches(flags):
        enough = np.sum(measured[start:stop]) >= limits.MIN_MEASUREMENTS
        if enough and stop - start >= rows:
            return start
    return None
