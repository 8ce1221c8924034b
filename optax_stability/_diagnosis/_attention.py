"""Attention whose logits have grown until each head looks at one token alone."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import sustained

# Key of the history → its limit, and what it is called. What was measured comes first.
_LOGITS = {
    "extra/attention_logits": (limits.ATTENTION_LOGIT, "largest attention logit"),
    "attention/logit_bound": (limits.LOGIT_BOUND, "bound on the attention logits"),
}


def attention_saturates(history: History) -> Finding | None:
    """Attention logits, or their bound, above a fixed level for three measurements."""
    for name, (limit, what) in _LOGITS.items():
        heads = history.layers(name)
        curves = list(zip(heads.keys, heads.names, strict=True))
        curves = curves or [(each.key, "") for each in history.find_all(name)]
        if curves:
            return _saturated(history, name, curves, limit, what)
    return None


def _saturated(
    history: History,
    name: str,
    curves: list[tuple[str, str]],
    limit: float,
    what: str,
) -> Finding | None:
    """The finding for curves by head; the first above, and of several the largest."""
    found = []
    for key, head in curves:
        size = np.abs(history.columns[key])
        row = sustained(size > limit, history.measured(key, name))
        if row is not None:
            found.append((row, -size[row], key, head))
    if not found:
        return None
    row, size, key, head = min(found)
    highest = max(np.nanmax(np.abs(history.columns[key])) for _, _, key, _ in found)
    evidence = (
        f"{what} {-size:.3g}, limit {limit:.0f} for {limits.MIN_MEASUREMENTS} "
        f"measurements; {len(found)} of {len(curves)} heads, at most {highest:.3g}"
    )
    return finding("attention_saturates", history, row, key, head or None, evidence)
