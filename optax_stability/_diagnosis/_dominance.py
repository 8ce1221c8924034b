"""One tensor whose gradient is nearly all of the norm."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import gradient_layers
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import median


def dominant_layer(history: History) -> Finding | None:
    """A layer with nearly all of the squared norm, in most rows after the descent."""
    layers = gradient_layers(history)
    if len(layers.names) < limits.DOMINATED_LAYERS:
        return None
    squares = layers.values**2
    whole = np.sum(squares, axis=1)
    rows = np.flatnonzero((whole > 0) & np.isfinite(whole))
    # In a short history most rows belong to the early descent.
    rows = rows[rows >= min(history.settled_row(), history.length // 4)]
    if len(rows) < limits.DIVERGED_MEASUREMENTS:
        return None
    share = squares[rows] / whole[rows, None]
    usual = median(share)
    at = int(np.argmax(usual))
    if usual[at] < limits.DOMINANT_SHARE:
        return None
    first = int(rows[(share[:, at] >= limits.DOMINANT_SHARE).argmax()])
    evidence = (
        f"{layers.names[at]} has {usual[at]:.1%} of the squared gradient norm (median "
        f"of {len(rows)} steps), limit {limits.DOMINANT_SHARE:.0%}; the other "
        f"{len(layers.names) - 1} layers share the rest"
    )
    return finding(
        "dominant_layer", history, first, layers.keys[at], layers.names[at], evidence
    )
