"""An exploding gradient."""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import first_affected, gradient_norm
from optax_stability._diagnosis._loss import loss_confirms, loss_of
from optax_stability._diagnosis._normal import base, caution, levels
from optax_stability._diagnosis._series import History, Series, log_of
from optax_stability._diagnosis._windows import finite, median, stretches

_LASTING = np.log(limits.NORM_FACTOR)


def exploding_gradient(history: History) -> Finding | None:
    """A gradient norm far above what was normal, that lasts or that the loss confirms.

    A jump is compared with the recent level, and what lasts with the lowest level so
    far, so that a slow rise counts as well.
    """
    norm = gradient_norm(history)
    if norm is None:
        return None
    past = history.normal(norm.key, log=True)
    limit = past.bound(limits.NORM_SCALES, _LASTING)
    events = [
        (start, stop)
        for start, stop in stretches(past.excess > limit)
        if _is_event(history, past.excess, start, stop)
    ]
    grown = _growth(history, norm)
    if grown and (not events or grown.row < events[0][0]):
        layer = first_affected(history, grown.row)
        return finding(
            "exploding_gradient", history, grown.row, norm.key, layer, grown.evidence
        )
    if not events:
        return None
    row = events[0][0]
    worst = max(
        (past.excess[a:b].max(), a + int(past.excess[a:b].argmax())) for a, b in events
    )
    evidence = (
        f"gradient norm {norm.values[row]:.3g} at step {history.steps[row]:.0f}, "
        f"{np.exp(past.level[row]):.3g} before (median of {limits.CENTRE}): "
        f"×{np.exp(past.excess[row]):.3g}, limit ×{np.exp(limit[row]):.3g}; steps "
        f"above the limit: {sum(b - a for a, b in events)}, worst "
        f"×{np.exp(worst[0]):.3g} at step {history.steps[worst[1]]:.0f}"
    )
    layer = first_affected(history, row)
    return finding("exploding_gradient", history, row, norm.key, layer, evidence)


class _Growth(NamedTuple):
    """A norm that has grown for long: where it left the healthy level, and how far."""

    row: int
    evidence: str


def _growth(history: History, norm: Series) -> _Growth | None:
    """A level far above the lowest so far, and above the usual one.

    A healthy norm may grow in proportion to the number of rows, and it may come back
    from a low.
    """
    logs = log_of(finite(norm.values))
    rows = np.flatnonzero(~np.isnan(logs))
    logs = logs[rows]
    if len(rows) < limits.CENTRE:
        return None
    past, level = base(logs, growth=1.0), levels(logs)
    wider = 1 + limits.EARLY_WIDENING * caution(past.known)
    noise = limits.NORM_SCALES * np.nan_to_num(past.noise) * wider
    limit = np.maximum(noise, _LASTING)
    for start, stop in stretches(level > past.level + limit, limits.CENTRE):
        usual = median(logs[:start]) + np.log(limits.USUAL_FACTOR)
        if stop - start < limits.CENTRE or np.max(level[start:stop]) < usual:
            continue
        near = max(start + 1 - limits.CENTRE, 0)
        single = logs[near : start + 1] > (past.level + limit)[near : start + 1]
        first = near + int(single.argmax()) if single.any() else start
        top = first + int(np.argmax(logs[first:stop]))
        rise = np.exp(logs[top] - past.level[first])
        return _Growth(
            int(rows[first]),
            f"gradient norm {np.exp(logs[first]):.3g} at step "
            f"{history.steps[rows[first]]:.0f}, and {np.exp(logs[top]):.3g} at step "
            f"{history.steps[rows[top]]:.0f}; {np.exp(past.level[first]):.3g} was the "
            f"level before (median of {limits.CENTRE}): ×{rise:.3g}, limit "
            f"×{np.exp(limit[first]):.3g}, for {stop - first} measurements",
        )
    return None


def _is_event(history: History, excess: np.ndarray, start: int, stop: int) -> bool:
    """Whether a jump lasts, is confirmed by the loss, or is enormous and unclipped."""
    if stop - start >= limits.NORM_ROWS:
        return True
    loss = loss_of(history)
    if (
        loss is not None
        and loss_confirms(history, loss)[start : stop + limits.NORM_ROWS].any()
    ):
        return True
    enormous = excess[start:stop].max() > np.log(limits.NORM_ENORMOUS)
    norm, limit = history.first("clip/norm"), history.first("clip/limit")
    if norm is None or limit is None:
        return bool(enormous)
    clipped = (norm.values > limit.values)[start:stop].all()
    return bool(enormous and not clipped)
