"""An exploding gradient."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import first_affected, gradient_norm, log_norm
from optax_stability._diagnosis._loss import loss_confirms, loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._trend import stretches, trend


def exploding_gradient(history: History) -> Finding | None:
    """A gradient norm far above its trend that lasts, or that the loss confirms."""
    norm = gradient_norm(history)
    if norm is None:
        return None
    past = trend(log_norm(norm.values), limits.NORM_SCALES, np.log(limits.NORM_FACTOR))
    events = [
        (start, stop)
        for start, stop in stretches(past.above)
        if _is_event(history, past.excess, start, stop)
    ]
    if not events:
        return None
    row = events[0][0]
    worst = max(
        (past.excess[a:b].max(), a + int(past.excess[a:b].argmax())) for a, b in events
    )
    evidence = (
        f"gradient norm {norm.values[row]:.3g} at step {history.steps[row]}, "
        f"{np.exp(past.centre[row]):.3g} before (median of {limits.CENTRE}): "
        f"×{np.exp(past.excess[row]):.3g}, limit ×{np.exp(past.bound[row]):.3g}; steps "
        f"above the limit: {sum(b - a for a, b in events)}, worst "
        f"×{np.exp(worst[0]):.3g} at step {history.steps[worst[1]]}"
    )
    layer = first_affected(history, row)
    return finding("exploding_gradient", history, row, norm.key, layer, evidence)


def _is_event(history: History, excess: np.ndarray, start: int, stop: int) -> bool:
    """Whether a jump lasts, is confirmed by the loss, or is enormous and unclipped."""
    if stop - start >= limits.NORM_ROWS:
        return True
    loss = loss_of(history)
    if loss is not None and loss_confirms(loss)[start : stop + limits.NORM_ROWS].any():
        return True
    enormous = excess[start:stop].max() > np.log(limits.NORM_ENORMOUS)
    norm, limit = history.first("clip/norm"), history.first("clip/limit")
    if norm is None or limit is None:
        return bool(enormous)
    clipped = (norm.values > limit.values)[start:stop].all()
    return bool(enormous and not clipped)
