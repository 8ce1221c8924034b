"""Gradients that are too small for their dtype, or for Adam's ε."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import gradient_norm
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History, is_embedding, is_vector
from optax_stability._diagnosis._windows import smooth, stretches, sustained


def underflow(history: History) -> Finding | None:
    """Exact zeros in half of the layers, or a gradient that is entirely zero."""
    return _all_zero(history) or _zeros_in_layers(history) or _zeros_rise(history)


def _all_zero(history: History) -> Finding | None:
    norm = gradient_norm(history)
    if norm is None:
        return None
    zero, loss = norm.values == 0, loss_of(history)
    if loss is not None:
        # A step whose microbatches were all left out has gradient 0 and no loss.
        zero &= ~np.isnan(loss.values)
    long = [(a, b) for a, b in stretches(zero) if b - a >= limits.VANISHED_ROWS]
    if not long:
        return None
    start, stop = long[0]
    evidence = f"every entry of the gradient is 0 for {stop - start} steps"
    return finding("underflow", history, start, norm.key, None, evidence)


def _zeros_in_layers(history: History) -> Finding | None:
    layers = history.layers("grad/zero_fraction")
    layers = layers.only(lambda name: not is_embedding(name))
    if not layers.keys:
        return None
    values = np.stack([history.forward_filled(key) for key in layers.keys], axis=1)
    # Frozen layers have no gradient; this is not underflow.
    used = np.flatnonzero((np.nan_to_num(values, nan=1.0) < 1).any(axis=0))
    if not len(used):
        return None
    low = values[:, used] >= limits.ZERO_FRACTION
    measured = history.measured(layers.keys[used[0]], "grad/zero_fraction")
    row = sustained(low.mean(axis=1) >= 0.5, measured)
    if row is None:
        return None
    # The layer that has been low for longest; on a tie, the one with the most zeros.
    since = row - np.argmax(low[row::-1] == 0, axis=0)
    since = np.where(low[: row + 1].all(axis=0), -1, since)
    first = np.where(low[row], -since, -np.inf)
    at = used[np.lexsort([values[row, used], first])[-1]]
    evidence = (
        f"{low[row].sum()} of {len(used)} layers have at least "
        f"{limits.ZERO_FRACTION:.0%} exact zeros, {layers.names[at]} "
        f"{values[row, at]:.0%} (embeddings not counted; limit: half of the layers)"
    )
    return finding(
        "underflow", history, row, layers.keys[at], layers.names[at], evidence
    )


def _zeros_rise(history: History) -> Finding | None:
    if history.layers("grad/zero_fraction").names:
        return None
    for zeros in history.find_all("grad/zero_fraction"):
        values = history.forward_filled(zeros.key)
        least = np.fmin.accumulate(smooth(values))
        measured = history.measured(zeros.key, "grad/zero_fraction")
        row = sustained(values >= least + limits.ZERO_RISE, measured)
        if row is not None:
            evidence = (
                f"{values[row]:.0%} exact zeros, {least[row]:.0%} before, limit "
                f"+{limits.ZERO_RISE:.0%}"
            )
            return finding("underflow", history, row, zeros.key, None, evidence)
    return None


def eps_dominated(history: History) -> Finding | None:
    """Adam's ε outweighs √v̂, on average over a layer."""
    layers = history.layers("adam/eps_share")
    keys, names = layers.keys, layers.names
    if not keys:
        whole = history.find_all("adam/eps_share")
        keys, names = [each.key for each in whole], [""] * len(whole)
    found = []
    for key, name in zip(keys, names, strict=True):
        # Rarely used rows of an embedding have a very small √v̂, which does no harm.
        if is_vector(name) or is_embedding(name):
            continue
        share = _eps_share(history, key)
        row = sustained(
            share >= limits.EPS_SHARE, history.measured(key, "adam/eps_share")
        )
        found += [(row, -share[row], key, name)] if row is not None else []
    if not found:
        return None
    row, share, key, name = min(found)
    evidence = (
        f"mean of ε/(√v̂ + ε) = {-share:.2g}, limit {limits.EPS_SHARE} (ε = √v̂), over "
        f"coordinates with a gradient; in {len(found)} of {len(keys)} curves"
    )
    return finding("eps_dominated", history, row, key, name or None, evidence)


def _eps_share(history: History, key: str) -> np.ndarray:
    """Mean of ε/(√v̂ + ε) over the coordinates that ever had a gradient."""
    share = history.forward_filled(key)
    zero_key = key.replace("eps_share", "zero_fraction")
    if zero_key not in history.columns:
        return share
    zeros = history.forward_filled(zero_key)
    seen = np.where(zeros < 1, 1 - zeros, np.nan)
    return (share - zeros) / seen
