"""The way out of a limit that a lasting change has made wrong."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import (
    Threshold,
    check_threshold,
    prints_its_call,
)


class RelearnState(NamedTuple):
    """State of :func:`relearn`.

    Attributes:
      above: int32[] – values in a row above the limit.
      rise: float32[] – greatest multiple of the limit that the next full row accepts.
      inner: state of the wrapped threshold.
    """

    above: jax.Array
    rise: jax.Array
    inner: Any


@prints_its_call
def relearn(
    threshold: Threshold, *, after: int, max_rise: float | jax.Array = 10.0
) -> Threshold:
    """Accepts a new level once ``after`` values in a row were above the limit.

    A spike is short. What stays above the limit is the new normal (a harder data mix, a
    longer batch, a higher learning rate), and a threshold that learns only clipped
    values would never accept it.

    **Rule**::

      x > limit:   above ← above + 1
      otherwise:   above ← 0, rise ← max_rise
      above = after:  state ← threshold.rebase(min(x, rise·limit), state)
                      above ← 0, rise ← rise²

    **Guarantees**

    * A level shift of up to ``max_rise`` times the limit, so ×10, is accepted after
      ``after`` values: the value number ``after`` + 1 is judged by the new level. ×50
      takes two rows; each row that follows another accepts the square of its rise, so
      that five rows reach 10³¹ times the level.
    * Until then limit and state are those of ``threshold``.
    * A value that is not finite neither counts nor ends a row.

    **Edge cases**: a disturbance longer than ``after`` is taken for a change, but only
    ``max_rise`` of it: forty gradients of 1,000 times the norm do not fill Adam's
    second moment. A limit that is not positive (a loss) rises to x at once.

    Args:
      threshold: the threshold to wrap.
      after: values in a row, ≥ 1. It is a trade: the length of a disturbance that is
        held down, and the delay after a lasting change.
      max_rise: greatest multiple of the limit that is accepted at once, > 1.

    Returns:
      A :class:`Threshold`.

    Raises:
      TypeError: ``threshold`` is not a ``Threshold``.
      ValueError: ``after`` is less than 1, ``max_rise`` not above 1.

    Example:
      >>> from optax_stability import thresholds
      >>> threshold = relearn(thresholds.zscore(warmup=2), after=3)
      >>> state = threshold.init()
      >>> for norm in (1.0, 1.2, 10.0, 10.0, 10.0, 10.0):
      ...     limit, state = threshold.update(norm, state)
      >>> print(limit)
      20.0
    """
    check_threshold("threshold", threshold)
    _validate.check_count("after", after, 1, "25 follows a change within 25 steps")
    _validate.check_interval("max_rise", max_rise, "(1, inf]", "10 is the default")
    first_rise = _validate.as_float32(max_rise)
    bound = min if _validate.is_concrete(max_rise) else jnp.minimum
    first_rise = bound(first_rise, _numerics.HUGE)

    def init():
        return RelearnState(
            above=jnp.zeros((), jnp.int32),
            rise=jnp.full((), first_rise, jnp.float32),
            inner=threshold.init(),
        )

    def update(x, state):
        limit, inner = threshold.update(x, state.inner)
        counted = jnp.where(x > limit, _numerics.increment(state.above), 0)
        above = jnp.where(jnp.isfinite(x), counted, state.above)
        accept = above >= after
        level = jnp.where(limit > 0, jnp.minimum(x, state.rise * limit), x)
        inner = optax.tree.where(accept, threshold.rebase(level, inner), inner)
        squared = jnp.minimum(state.rise * state.rise, _numerics.HUGE)
        rise = jnp.where(x <= limit, first_rise, state.rise)
        return limit, RelearnState(
            above=jnp.where(accept, 0, above),
            rise=jnp.where(accept, squared, rise),
            inner=inner,
        )

    def rebase(x, state):
        return RelearnState(
            above=jnp.zeros_like(state.above),
            rise=jnp.full_like(state.rise, first_rise),
            inner=threshold.rebase(x, state.inner),
        )

    return Threshold(init, update, rebase)
