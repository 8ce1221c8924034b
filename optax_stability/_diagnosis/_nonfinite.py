"""NaN and Inf in any recorded metric."""

from collections.abc import Iterator

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import Advice, finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import (
    gradient_layers,
    gradient_norm,
    largest_layer,
)
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History, Layers, Series
from optax_stability._diagnosis._windows import stretches

_COUNTERS = (
    "skip/nonfinite_total",
    "clip/nonfinite_total",
    "accumulate/rejected_total",
)


# Columns that no fault of the numbers makes NaN: where all that exist are NaN, nothing
# was measured.
_ALWAYS_KNOWN = ("learning_rate", "epoch", "skip/skipped", "skip/total")
# What an accumulator leaves behind that holds a NaN.
_ACCUMULATOR = Advice(
    (
        "an accumulator of gradients holds a NaN: what is added to it stays NaN, and "
        "every later window is not finite, though the parameters are intact",
    ),
    (
        "accumulate with `accumulate_moments`, which leaves out microbatches that are "
        "not finite, in place of `optax.MultiSteps` or a sum of your own",
        "set the accumulator to zero, not to itself times zero, after each update",
    ),
)
# A leaf whose gradient is never finite: often one that is not trained at all.
_FROZEN = Advice(
    (
        "the gradient of one leaf is not finite in any step: often a leaf that "
        "is not trained, whose gradient nobody looked at",
    ),
    (
        "keep leaves that are not trained out of the guard: "
        '`optax.partition({"train": spike_guard(inner), "stop": optax.set_to_zero()}, '
        "labels)`",
    ),
)


def nonfinite(history: History) -> Finding | None:
    """NaN or Inf in loss, gradient, updates or parameters."""
    signs = [each for each in _indicators(history) if each[1].any()]
    if not signs:
        return None
    key, flags = min(signs, key=lambda each: int(each[1].argmax()))
    row = int(flags.argmax())
    count = np.sum(np.any([flags for _, flags in signs], axis=0))
    evidence = (
        f"{key} = {history.columns[key][row]:.3g}; {_recovery_of(history, row, key)}; "
        f"rows with NaN or Inf: {count}"
    )
    layer = _nonfinite_layer(history, row)
    poisoned = _ACCUMULATOR if _accumulator_holds_it(history, row) else None
    if _never_finite_layer(history):
        poisoned = _FROZEN
    return finding("nonfinite", history, row, key, layer, evidence, poisoned)


def _accumulator_holds_it(history: History, row: int) -> bool:
    """Whether no later gradient is finite, though the parameters are intact.

    They are if the loss stays finite, or if every such step was skipped.
    """
    loss, skipped = loss_of(history), history.first("skip/skipped")
    if history.length - row < limits.VANISHED_ROWS:
        return False
    if not any(_is_lost_from(norm.values, row) for norm in _norms_with_nan(history)):
        return False
    if loss is not None and loss.key == "loss":
        return bool(np.isfinite(loss.values[row:]).mean() > 0.9)
    return skipped is not None and bool(np.all(skipped.values[row:] == 1))


def _norms_with_nan(history: History) -> list[Series]:
    """The norms of the gradient that was accumulated, and of the one before."""
    norms = [_norm_with_nan(history), history.first("skip/norm")]
    return [norm for norm in norms if norm is not None]


def _is_lost_from(values: np.ndarray, row: int) -> bool:
    """Whether a norm was finite before a row, and never is from there on."""
    finite = np.isfinite(values)
    return bool(finite[:row].any() and not finite[row:].any())


def _norm_with_nan(history: History) -> Series | None:
    """The gradient norm, also if it was never finite."""
    if "grad/norm" in history.columns:
        return Series("grad/norm", history.columns["grad/norm"])
    return gradient_norm(history)


def _indicators(history: History) -> list[tuple[str, np.ndarray]]:
    """(key, bool[T]) of every metric that shows NaN or Inf; the most certain first."""
    shares = [f"{place}/nonfinite" for place in ("grad", "update", "params")]
    found = []
    for name in (*shares, "microbatches/rejected"):
        found += [(each.key, each.values > 0) for each in history.find_all(name)]
    for name in _COUNTERS:
        for each in history.find_all(name):
            found.append((each.key, _increases(each.values, history.steps)))
    norm, blank = gradient_norm(history), _blank(history)
    norms = [norm, *map(history.first, ("update/norm", "params/norm"))]
    scaling = _looks_for_a_loss_scale(history, norm)
    found += [
        (each.key, _newly_nonfinite(each.values, blank) & ~scaling)
        for each in norms
        if each is not None
    ]
    loss = loss_of(history)
    if loss is not None:
        found.append((loss.key, _nonfinite_loss(loss, norm, blank)))
    for key in ("grad/norm", "loss"):
        values = history.columns.get(key)
        if values is not None and np.isnan(values).all():
            found.append((key, ~blank))
    return found


def _looks_for_a_loss_scale(history: History, norm: Series | None) -> np.ndarray:
    """bool[T]: first rows whose norm overflows, while the loss is finite."""
    found, loss = np.zeros(history.length, bool), loss_of(history)
    if norm is None or loss is None or not np.isfinite(loss.values).all():
        return found
    first = limits.LOSS_SCALE_ROWS
    if np.isfinite(norm.values[first : 2 * first + 1]).all():
        found[:first] = True
    return found


def _blank(history: History) -> np.ndarray:
    """bool[T]: rows in which not even what is always known was written."""
    known = [history.columns[key] for key in _ALWAYS_KNOWN if key in history.columns]
    if not known:
        return np.zeros(history.length, bool)
    return np.all(np.isnan(known), axis=0)


def _increases(total: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """bool[T]: a counter increased; its count at the start of the history is old."""
    before = np.concatenate([total[:1], total[:-1]])
    if len(total) and steps[0] == 0:
        before[0] = 0.0
    return total > before


def _newly_nonfinite(values: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """bool[T]: Inf, or NaN in a metric that was measured until then.

    A metric was measured in three rows before, or in all rows before if it never comes
    back, or every few rows for much longer than the gap.
    """
    missing, broken = np.isnan(values), np.isinf(values)
    for start, stop in stretches(missing):
        before = missing[max(0, start - limits.MIN_MEASUREMENTS) : start]
        enough = len(before) == limits.MIN_MEASUREMENTS or stop == len(values)
        if len(before) and enough and not before.any():
            broken[start:stop] = True
    return (broken | _lost(missing)) & ~blank


def _lost(missing: np.ndarray) -> np.ndarray:
    """bool[T]: gaps much longer than all others, in what is measured now and then."""
    gaps = stretches(missing)
    lengths = sorted(stop - start for start, stop in gaps)
    usual = lengths[-2] if len(lengths) > 1 else 0
    lost = np.zeros(len(missing), bool)
    for start, stop in gaps:
        known = np.sum(~missing[:start])
        long = stop - start >= max(2 * limits.VANISHED_ROWS, limits.LOST_GAPS * usual)
        at_every_row = known == start > 0 and stop == len(missing)
        if long and (known >= limits.MIN_MEASUREMENTS or at_every_row):
            lost[start + usual : stop] = True
    return lost


def _nonfinite_loss(loss: Series, norm: Series | None, blank: np.ndarray) -> np.ndarray:
    """The same for the loss, where NaN may also mean that no loss was passed."""
    broken = _newly_nonfinite(loss.values, blank)
    if norm is None:
        return broken
    lost = _lost(np.isnan(loss.values)) & ~blank
    return broken & (np.isinf(loss.values) | ~np.isfinite(norm.values) | lost)


def _recovery_of(history: History, row: int, key: str) -> str:
    """Whether what broke became finite again; a share is that of the gradient."""
    own = key if key in ("loss", "skip/value") else None
    norms = _norms_with_nan(history)
    if own is None and norms:
        lost = [norm for norm in norms if _is_lost_from(norm.values, row)]
        own = (lost or norms)[0].key
    if own is None:
        return "neither loss nor gradient norm was recorded"
    rest = np.isfinite(history.columns[own][row + 1 :])
    if not len(rest):
        return "the history ends here"
    if not rest.any():
        return f"{own} is not finite in any of the {len(rest)} later steps"
    again = history.steps[row + 1 + int(rest.argmax())]
    return f"{own} is finite again at step {again:.0f}"


def _nonfinite_layer(history: History, row: int) -> str | None:
    """The layer with the largest non-finite share; None if every layer has some."""
    for layers, amount in _nonfinite_layers(history, row):
        if np.any(amount > 0):
            return None if np.all(amount > 0) else largest_layer(amount, layers)
    return None


def _nonfinite_layers(
    history: History, row: int
) -> Iterator[tuple[Layers, np.ndarray]]:
    """What says which layers are not finite in a row; the most precise first."""
    shares = history.layers("grad/nonfinite")
    yield shares, shares.values[row]
    counts = history.layers("skip/nonfinite")
    yield counts, _rises(counts, history)[row]
    norms = gradient_layers(history)
    yield norms, np.where(np.isfinite(norms.values[row]), 0.0, 1.0)


def _rises(counts: Layers, history: History) -> np.ndarray:
    """float64[T, n_layers]: 1 where the counter of a layer increased."""
    steps = history.steps
    columns = [_increases(each, steps) for each in counts.values.T]
    return np.array(columns, float).reshape(-1, history.length).T


def _never_finite_layer(history: History) -> bool:
    """Whether some layers, but not all, are not finite in any row."""
    if history.length < limits.VANISHED_ROWS:
        return False
    # What the counter was before the first row is not known.
    always = _rises(history.layers("skip/nonfinite"), history)[1:].all(axis=0)
    return bool(always.any() and not always.all())
