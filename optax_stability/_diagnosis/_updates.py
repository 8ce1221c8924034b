"""How updates are distributed, how alike they are, and how large for the weights."""

from collections.abc import Callable

import numpy as np

from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History, is_embedding, is_vector
from optax_stability._diagnosis._trend import sustained

# (key, name of the layer or "" for the whole)
Curves = list[tuple[str, str]]


def whole_and_layers(history: History, name: str) -> Curves:
    """The curves of the whole, then those of matrices; embeddings have their own ways.

    Rows of an embedding are updated now and then, and vectors often start at zero.
    """
    layers = history.layers(name)
    matrices = [
        (key, layer)
        for key, layer in zip(layers.keys, layers.names, strict=True)
        if not is_vector(layer) and not is_embedding(layer)
    ]
    return [(each.key, "") for each in history.streams(name)] + matrices


def first_of(
    history: History, curves: Curves, row_of: Callable[[str, str], int | None]
) -> tuple[int, str, str, int] | None:
    """(row, key, layer, number of curves) of the curve that was first, if any was.

    Of the whole and a layer at the same row, the key of the whole and the layer.
    """
    found = [(row_of(key, layer), i) for i, (key, layer) in enumerate(curves)]
    rows = [(row, i) for row, i in found if row is not None]
    if not rows:
        return None
    row, at = min(rows)
    key, layer = curves[at]
    if not layer:
        same = [curves[i][1] for other, i in rows if other <= row and curves[i][1]]
        layer = same[0] if same else ""
    return row, key, layer, len(rows)


def bimodal_updates(history: History) -> Finding | None:
    """Updates that were spread around zero and now are plus or minus the same."""

    def row_of(key: str, _: str) -> int | None:
        values, measured = history.held(key), history.measured(key, "update/bimodality")
        later = np.arange(history.length) >= history.settled()
        normal = sustained((values <= limits.UNIMODAL) & later, measured)
        if normal is None:
            return None
        later = np.arange(history.length) > normal
        return sustained((values >= limits.BIMODAL) & later, measured)

    curves = whole_and_layers(history, "update/bimodality")
    first = first_of(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    evidence = (
        f"(Σx²)²/(n·Σx⁴) = {history.columns[key][row]:.2f}, limit {limits.BIMODAL} "
        f"(normal 0.33, even spread 0.56, ±a 1), after at most {limits.UNIMODAL}; "
        f"{count} of {len(curves)} curves"
    )
    return finding("bimodal_updates", history, row, key, layer or None, evidence)


def correlated_updates(history: History) -> Finding | None:
    """Successive gradients, or updates, that are nearly the same."""
    name, limit = "adam/correlation", limits.CORRELATED
    curves = whole_and_layers(history, name)
    if not curves:
        name, limit = "update/correlation", limits.CORRELATED_COSINE
        curves = whole_and_layers(history, name)
    later = np.arange(history.length) >= history.settled()

    def row_of(key: str, _: str) -> int | None:
        return sustained(
            (history.held(key) >= limit) & later, history.measured(key, name)
        )

    first = first_of(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    evidence = (
        f"{name} {history.columns[key][row]:.3f}, limit {limit:.3f} for "
        f"{limits.LASTS} measurements (independent gradients: "
        f"{'0' if name.startswith('adam') else 'β₁'}); {count} of {len(curves)} curves"
    )
    return finding("correlated_updates", history, row, key, layer or None, evidence)


def update_too_large(history: History) -> Finding | None:
    """Updates that replace the weights within a few steps."""
    later = np.arange(history.length) >= history.settled()

    def limit_of(layer: str) -> float:
        return limits.LAYER_RATIO_LARGE if layer else limits.RATIO_LARGE

    def row_of(key: str, layer: str) -> int | None:
        large = (history.held(key) >= limit_of(layer)) & later
        return sustained(
            large, history.measured(key, "update/param_ratio"), limits.RATIO_LASTS
        )

    curves = whole_and_layers(history, "update/param_ratio")
    first = first_of(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    is_whole = (key, "") in curves
    evidence = (
        f"‖update‖/‖parameters‖ = {history.columns[key][row]:.2g} for at least "
        f"{limits.RATIO_LASTS} steps, limit {limit_of('' if is_whole else layer)}; "
        f"{count} of {len(curves)} curves (the whole and every matrix)"
    )
    return finding("update_too_large", history, row, key, layer or None, evidence)


def update_too_small(history: History) -> Finding | None:
    """Updates that would take a million steps to replace the weights.

    Where the learning rate is not known, it may be the warm-up or the end of a decay:
    then it takes a longer history. All measurements must be too small.
    """
    later = np.arange(history.length) >= history.settled()
    rated = history.peak_rate() is not None
    rows = limits.RATIO_LASTS if rated else limits.CLIPPED_WINDOW
    for ratio in history.streams("update/param_ratio"):
        values = history.held(ratio.key)
        known = later & np.isfinite(values)
        small = values <= limits.RATIO_SMALL
        row = sustained(
            small & known, history.measured(ratio.key, "update/param_ratio"), rows
        )
        if row is None or not small[known].all():
            continue
        evidence = (
            f"‖update‖/‖parameters‖ = {np.median(values[known]):.2g} (median of "
            f"{known.sum()} steps), limit {limits.RATIO_SMALL:.0e}; about 1e-3 is usual"
        )
        return finding("update_too_small", history, row, ratio.key, None, evidence)
    return None
