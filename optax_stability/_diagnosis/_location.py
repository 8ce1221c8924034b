"""Gradient norms, and the layer that was affected first."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._series import History, Layers, Series
from optax_stability._diagnosis._trend import trend


def log_norm(values: np.ndarray) -> np.ndarray:
    """Logarithm of norms; NaN where the norm is not positive."""
    return np.log(np.where(values > 0, values, np.nan))


def gradient_norm(history: History) -> Series | None:
    """The norm of the whole gradient, before clipping."""
    return history.first("grad/norm", "skip/norm", "clip/norm")


def gradient_layers(history: History) -> Layers:
    """Gradient norms of the layers."""
    return history.layers("grad/norm", "clip/norm")


def largest_layer(amount: np.ndarray, layers: Layers) -> str | None:
    """The layer with the largest amount; None if every amount is −∞ or NaN."""
    if not np.any(amount > -np.inf):
        return None
    return layers.names[int(np.nanargmax(amount))]


def first_affected(history: History, row: int) -> str | None:
    """The layer whose gradient norm was first above its trend, shortly before a row.

    Among several layers in the same row, the one with the largest excess relative to
    its own scale.
    """
    layers = gradient_layers(history)
    start = max(0, row - 2 * (limits.WINDOW + limits.CENTRE))
    values = log_norm(layers.values[start : row + 1])
    if not values.size:
        return None
    past = trend(values, limits.NORM_SCALES, np.log(limits.LOCATE_FACTOR))
    recently = np.flatnonzero(past.above[-limits.CENTRE :].any(axis=1))
    if not len(recently):
        return None
    at = max(len(values) - limits.CENTRE, 0) + int(recently[0])
    return largest_layer(
        np.where(past.above[at], past.excess[at] / past.scale[at], -np.inf), layers
    )
