"""Gradient norms, and the layer that was affected first."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._normal import normal
from optax_stability._diagnosis._series import History, Layers, Series, log_of


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
    values = log_of(layers.values[start : row + 1])
    if not values.size:
        return None
    past = [normal(each) for each in values.T]
    floor = np.log(limits.LOCATE_FACTOR)
    above = np.stack([each.above(limits.NORM_SCALES, floor) for each in past], axis=1)
    recently = np.flatnonzero(above[-limits.CENTRE :].any(axis=1))
    if not len(recently):
        return None
    at = max(len(values) - limits.CENTRE, 0) + int(recently[0])
    scores = [each.excess[at] / each.noise[at] for each in past]
    return largest_layer(np.where(above[at], scores, -np.inf), layers)
