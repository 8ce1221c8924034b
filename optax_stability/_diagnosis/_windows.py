"""Medians over windows of rows, and stretches of flagged rows.

A window may hold values that are NaN: they are left out.
"""

import numpy as np

from optax_stability._diagnosis import _limits as limits


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


def trailing(values: np.ndarray, width: int) -> np.ndarray:
    """float[T, width]: in each row the last ``width`` values, NaN before the first."""
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    return np.lib.stride_tricks.sliding_window_view(padded, width)


def smooth(values: np.ndarray) -> np.ndarray:
    """Trailing median of ``CENTRE`` values, fewer at the start; [T] or [T, n]."""
    if not values.size:
        return values
    columns = finite(values.reshape(len(values), -1)).T
    smoothed = [median(trailing(each, limits.CENTRE), axis=1) for each in columns]
    return np.stack(smoothed, axis=1).reshape(values.shape)


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
