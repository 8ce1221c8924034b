"""The distribution, correlation and relative size of updates."""

from collections.abc import Callable

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History, is_embedding, is_vector
from optax_stability._diagnosis._windows import sustained

# (key, name of the layer, or "" for all parameters together)
Curves = list[tuple[str, str]]


def global_and_layers(history: History, name: str) -> Curves:
    """The global curves, then those of the matrices.

    Embeddings are left out because their rows are updated rarely, and vectors because
    they often start at zero.
    """
    layers = history.layers(name)
    matrices = [
        (key, layer)
        for key, layer in zip(layers.keys, layers.names, strict=True)
        if not is_vector(layer) and not is_embedding(layer)
    ]
    return [(each.key, "") for each in history.find_all(name)] + matrices


def first_affected_curve(
    history: History, curves: Curves, row_of: Callable[[str, str], int | None]
) -> tuple[int, str, str, int] | None:
    """(row, key, layer, number of affected curves) of the first affected curve.

    If a global curve and a layer are first in the same row, the key is that of the
    global curve, and the layer is named.
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
    """Updates that were spread around zero, and now take two values ±a."""

    def row_of(key: str, _: str) -> int | None:
        values = history.forward_filled(key)
        measured = history.measured(key, "update/bimodality")
        later = np.arange(history.length) >= history.settled_row()
        normal = sustained((values <= limits.UNIMODAL) & later, measured)
        if normal is None:
            return None
        later = np.arange(history.length) > normal
        return sustained((values >= limits.BIMODAL) & later, measured)

    curves = global_and_layers(history, "update/bimodality")
    first = first_affected_curve(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    evidence = (
        f"(Σx²)²/(n·Σx⁴) = {history.columns[key][row]:.2f}, limit {limits.BIMODAL} "
        f"(Gaussian 0.33, uniform 0.56, two values ±a 1), at most {limits.UNIMODAL} "
        f"before; {count} of {len(curves)} curves"
    )
    return finding("bimodal_updates", history, row, key, layer or None, evidence)


def correlated_updates(history: History) -> Finding | None:
    """Successive gradients, or updates, that are nearly equal."""
    name, limit = "adam/correlation", limits.CORRELATED
    curves = global_and_layers(history, name)
    if not curves:
        name, limit = "update/correlation", limits.CORRELATED_COSINE
        curves = global_and_layers(history, name)
    later = np.arange(history.length) >= history.settled_row()

    def row_of(key: str, _: str) -> int | None:
        return sustained(
            (history.forward_filled(key) >= limit) & later, history.measured(key, name)
        )

    first = first_affected_curve(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    evidence = (
        f"{name} {history.columns[key][row]:.3f}, limit {limit:.3f} for "
        f"{limits.MIN_MEASUREMENTS} measurements (independent gradients: "
        f"{'0' if name.startswith('adam') else 'β₁'}); {count} of {len(curves)} curves"
    )
    return finding("correlated_updates", history, row, key, layer or None, evidence)


def update_too_large(history: History) -> Finding | None:
    """Updates that replace the weights within a few steps."""
    later = np.arange(history.length) >= history.settled_row()

    def limit_of(layer: str) -> float:
        return limits.LAYER_RATIO_LARGE if layer else limits.RATIO_LARGE

    def row_of(key: str, layer: str) -> int | None:
        large = (history.forward_filled(key) >= limit_of(layer)) & later
        return sustained(
            large, history.measured(key, "update/param_ratio"), limits.RATIO_ROWS
        )

    curves = global_and_layers(history, "update/param_ratio")
    first = first_affected_curve(history, curves, row_of)
    if first is None:
        return None
    row, key, layer, count = first
    is_global = (key, "") in curves
    evidence = (
        f"‖update‖/‖parameters‖ = {history.columns[key][row]:.2g} for at least "
        f"{limits.RATIO_ROWS} steps, limit {limit_of('' if is_global else layer)}; "
        f"{count} of {len(curves)} curves (all parameters, and each matrix)"
    )
    return finding("update_too_large", history, row, key, layer or None, evidence)


def update_too_small(history: History) -> Finding | None:
    """Updates that would take a million steps to replace the weights.

    All measurements must be too small. If the learning rate is unknown, the steps may
    belong to the warm-up or to the end of a decay: then a longer history is needed.
    """
    later = np.arange(history.length) >= history.settled_row()
    rated = history.peak_rate_row() is not None
    rows = limits.RATIO_ROWS if rated else limits.CLIPPED_WINDOW
    for ratio in history.find_all("update/param_ratio"):
        values = history.forward_filled(ratio.key)
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
