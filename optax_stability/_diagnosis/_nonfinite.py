"""NaN and Inf in any recorded metric."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import (
    gradient_layers,
    gradient_norm,
    largest_layer,
)
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History, Series
from optax_stability._diagnosis._trend import stretches

_COUNTERS = (
    "skip/nonfinite_total",
    "clip/nonfinite_total",
    "accumulate/rejected_total",
)


def nonfinite(history: History) -> Finding | None:
    """NaN or Inf in loss, gradient, updates or parameters."""
    signs = [each for each in _indicators(history) if each[1].any()]
    if not signs:
        return None
    key, flags = min(signs, key=lambda each: int(each[1].argmax()))
    row = int(flags.argmax())
    evidence = f"{key} = {history.columns[key][row]:.3g}; {_recovery_of(history, row)}"
    layer = _nonfinite_layer(history, row)
    return finding("nonfinite", history, row, key, layer, evidence)


def _indicators(history: History) -> list[tuple[str, np.ndarray]]:
    """(key, bool[T]) of every metric that shows NaN or Inf; the most certain first."""
    shares = [f"{place}/nonfinite" for place in ("grad", "update", "params")]
    found = []
    for name in (*shares, "microbatches/rejected"):
        found += [(each.key, each.values > 0) for each in history.find_all(name)]
    for name in _COUNTERS:
        for each in history.find_all(name):
            found.append((each.key, _increases(each.values, history.steps)))
    norm = gradient_norm(history)
    norms = [norm, *map(history.first, ("update/norm", "params/norm"))]
    found += [
        (each.key, _newly_nonfinite(each.values)) for each in norms if each is not None
    ]
    loss = loss_of(history)
    if loss is not None:
        found.append((loss.key, _nonfinite_loss(loss, norm)))
    return found


def _increases(total: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """bool[T]: a counter increased; its count at the start of the history is old."""
    before = np.concatenate([total[:1], total[:-1]])
    if len(total) and steps[0] == 0:
        before[0] = 0.0
    return total > before


def _newly_nonfinite(values: np.ndarray) -> np.ndarray:
    """bool[T]: Inf, or NaN in a metric that was measured at every step until then."""
    missing, broken = np.isnan(values), np.isinf(values)
    for start, stop in stretches(missing):
        before = missing[max(0, start - limits.MIN_MEASUREMENTS) : start]
        if len(before) == limits.MIN_MEASUREMENTS and not before.any():
            broken[start:stop] = True
    return broken


def _nonfinite_loss(loss: Series, norm: Series | None) -> np.ndarray:
    """The same for the loss, where NaN may also mean that no loss was passed."""
    broken = _newly_nonfinite(loss.values)
    if norm is None:
        return broken
    return broken & (np.isinf(loss.values) | ~np.isfinite(norm.values))


def _recovery_of(history: History, row: int) -> str:
    """Whether loss or gradient norm became finite again."""
    for series in (loss_of(history), gradient_norm(history)):
        if series is None:
            continue
        rest = np.isfinite(series.values[row + 1 :])
        if not len(rest):
            return "the history ends here"
        if not rest.any():
            return f"{series.key} is not finite in any of the {len(rest)} later steps"
        again = history.steps[row + 1 + int(rest.argmax())]
        return f"{series.key} is finite again at step {again}"
    return "neither loss nor gradient norm was recorded"


def _nonfinite_layer(history: History, row: int) -> str | None:
    """The layer with the largest non-finite share; None if every layer has some."""
    layers = history.layers("grad/nonfinite")
    amount = layers.values[row]
    if not amount.size:
        layers = gradient_layers(history)
        amount = np.where(np.isfinite(layers.values[row]), 0.0, 1.0)
    if not np.any(amount > 0) or np.all(amount > 0):
        return None
    return largest_layer(amount, layers)
