"""NaN and Inf, wherever they show."""

import numpy as np

from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import (
    furthest,
    gradient_layers,
    gradient_norm,
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
    signs = [each for each in _signs(history) if each[1].any()]
    if not signs:
        return None
    key, flags = min(signs, key=lambda each: int(each[1].argmax()))
    row = int(flags.argmax())
    evidence = f"{key} = {history.columns[key][row]:.3g}; {_aftermath(history, row)}"
    layer = _broken_layer(history, row)
    return finding("nonfinite", history, row, key, layer, evidence)


def _signs(history: History) -> list[tuple[str, np.ndarray]]:
    """(key, bool[T]) for all that can tell; the most certain first."""
    shares = [f"{place}/nonfinite" for place in ("grad", "update", "params")]
    found = []
    for name in (*shares, "microbatches/rejected"):
        found += [(each.key, each.values > 0) for each in history.streams(name)]
    for name in _COUNTERS:
        for each in history.streams(name):
            found.append((each.key, _increases(each.values, history.steps)))
    norm = gradient_norm(history)
    norms = [norm, *map(history.first, ("update/norm", "params/norm"))]
    found += [(each.key, _breaks(each.values)) for each in norms if each is not None]
    loss = loss_of(history)
    if loss is not None:
        found.append((loss.key, _bad_loss(loss, norm)))
    return found


def _increases(total: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """bool[T]: a counter went up; what it held when the history began is old."""
    before = np.concatenate([total[:1], total[:-1]])
    if len(total) and steps[0] == 0:
        before[0] = 0.0
    return total > before


def _breaks(values: np.ndarray) -> np.ndarray:
    """bool[T]: Inf, or NaN in what was measured at every step until then."""
    missing, broken = np.isnan(values), np.isinf(values)
    for start, stop in stretches(missing):
        before = missing[max(0, start - limits.LASTS) : start]
        if len(before) == limits.LASTS and not before.any():
            broken[start:stop] = True
    return broken


def _bad_loss(loss: Series, norm: Series | None) -> np.ndarray:
    """The same of the loss, whose NaN may also mean that none was given."""
    broken = _breaks(loss.values)
    if norm is None:
        return broken
    return broken & (np.isinf(loss.values) | ~np.isfinite(norm.values))


def _aftermath(history: History, row: int) -> str:
    """Whether the run went on."""
    for series in (loss_of(history), gradient_norm(history)):
        if series is None:
            continue
        rest = np.isfinite(series.values[row + 1 :])
        if not len(rest):
            return "the history ends here"
        if not rest.any():
            return f"{series.key} is not finite again in the {len(rest)} steps after"
        again = history.steps[row + 1 + int(rest.argmax())]
        return f"{series.key} is finite again at step {again}"
    return "nothing else is known"


def _broken_layer(history: History, row: int) -> str | None:
    """The layer with the largest share, unless it is all of them."""
    layers = history.layers("grad/nonfinite")
    amount = layers.values[row]
    if not amount.size:
        layers = gradient_layers(history)
        amount = np.where(np.isfinite(layers.values[row]), 0.0, 1.0)
    if not np.any(amount > 0) or np.all(amount > 0):
        return None
    return furthest(amount, layers)
