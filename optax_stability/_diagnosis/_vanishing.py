"""Gradients that vanish, and gradients that vanish and then surge.

*Source*: before a spike, the gradient of shallow layers vanishes, Adam's second moment
decays, and then the gradient returns; Molybog et al., "A Theory on Adam Instability in
Large-Scale Machine Learning", 2023, arXiv:2304.09871.
"""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import (
    gradient_layers,
    gradient_norm,
)
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History, Layers, depth, is_vector, log_of
from optax_stability._diagnosis._windows import median, smooth, stretches

# Replaces a norm of 0 in logarithms; below every positive float32.
_ZERO_NORM = 1e-50


def _far_below_past(
    history: History, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """bool[T, n], twice: norms that are orders below their earlier level.

    First for trailing medians, then for single values; the earlier level is the largest
    median since the early descent. A gradient that falls together with the loss is
    healthy, so the norm must have fallen far more than the loss.
    """
    start = _first_row(history)
    single = np.log(
        np.where(values == 0, _ZERO_NORM, np.where(values > 0, values, np.nan))
    )
    level = smooth(single)
    level[:start] = np.nan
    limit = np.fmax.accumulate(level) - np.log(limits.VANISHED_FACTOR)
    loss = loss_of(history)
    if loss is not None:
        loss_level = smooth(log_of(loss.values))
        loss_level[:start] = np.nan
        fall = np.fmax.accumulate(loss_level) - loss_level
        limit -= np.nan_to_num(2 * fall)[:, None]
    return level <= limit, single <= limit


def _first_row(history: History) -> int:
    """Where the early descent has ended; in a short history, after a quarter of it."""
    quarter = max(history.length // 4, limits.CENTRE)
    return min(history.settled_row(), quarter)


def _falls(history: History, values: np.ndarray) -> list[list[tuple[int, int]]]:
    """(start, stop) of each fall that lasts, for each curve."""
    found = []
    for level, single in zip(
        *(each.T for each in _far_below_past(history, values)), strict=True
    ):
        falls = []
        for start, stop in stretches(level, limits.CENTRE):
            # The median lags by half its window; the single values do not.
            near = max(start + 1 - limits.CENTRE, 0)
            first = near + int(single[near : start + 1].argmax())
            if stop - start >= limits.VANISHED_ROWS:
                falls.append((first if single[first] else start, stop))
        found.append(falls)
    return found


def vanishing_gradient(history: History) -> Finding | None:
    """A gradient norm, global or of a layer, that is orders below its earlier level."""
    norm, layers = gradient_norm(history), gradient_layers(history)
    layers = layers.only(lambda name: not is_vector(name))
    if norm is not None:
        values = np.column_stack([norm.values, layers.values])
        layers = Layers([norm.key, *layers.keys], ["", *layers.names], values)
    if not layers.values.size:
        return None
    falls = _falls(history, layers.values)
    found = [(each[0][0], i) for i, each in enumerate(falls) if each]
    if not found:
        return None
    row, at = min(found)
    values = layers.values[:, at]
    start = _first_row(history)
    before = median(values[start:row])
    evidence = (
        f"gradient norm {values[row]:.3g} at step {history.steps[row]}, {before:.3g} "
        f"before (median since step {history.steps[start]:.0f}), limit "
        f"÷{limits.VANISHED_FACTOR:.0f} for {limits.VANISHED_ROWS} steps; "
        f"{sum(layers.names[i] != '' for _, i in found)} layers affected"
    )
    # If the global norm was first, the first of the layers that followed.
    layer = next((layers.names[i] for _, i in sorted(found) if layers.names[i]), None)
    return finding("vanishing_gradient", history, row, layers.keys[at], layer, evidence)


def vanishing_then_surge(history: History) -> Finding | None:
    """A shallow layer whose gradient vanishes and then returns abruptly."""
    layers = gradient_layers(history)
    depths = [depth(name) for name in layers.names]
    shallow = np.median(depths) if depths else np.inf
    layers = layers.only(lambda name: depth(name) <= shallow and not is_vector(name))
    if not layers.values.size:
        return None
    found = []
    for i, falls in enumerate(_falls(history, layers.values)):
        for start, stop in falls:
            surge = _surge(layers.values[:, i], start, stop)
            found += [(start, -surge[1], i, surge[0])] if surge else []
    if not found:
        return None
    row, factor, at, surged = min(found)
    evidence = (
        f"gradient norm {layers.values[row, at]:.3g} from step {history.steps[row]} "
        f"on, more than ÷{limits.VANISHED_FACTOR:.0f} below its earlier level; "
        f"{layers.values[surged, at]:.3g} at step {history.steps[surged]}: "
        f"×{-factor:.3g}, limit ×{limits.SURGE_FACTOR:.0f} within "
        f"{limits.SURGE_ROWS} steps"
    )
    return finding(
        "vanishing_then_surge",
        history,
        row,
        layers.keys[at],
        layers.names[at],
        evidence,
    )


def _surge(values: np.ndarray, start: int, stop: int) -> tuple[int, float] | None:
    """The row and factor of the rise at the end of a fall, if it is steep."""
    # The median lags by half its window, so the fall ends before ``stop``.
    quiet = median(values[start : max(stop - limits.CENTRE, start + 1)])
    end = max(stop - limits.CENTRE, start)
    after = values[end : stop + limits.SURGE_ROWS]
    after = np.where(np.isfinite(after), after, 0.0)
    surged = end + int(np.argmax(after))
    factor = float(after.max() / max(quiet, _ZERO_NORM))
    return (surged, factor) if factor >= limits.SURGE_FACTOR else None
