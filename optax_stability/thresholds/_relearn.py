"""Adapts a threshold to a lasting change of the level of its stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import (
    Threshold,
    check_threshold,
    threshold_factory,
)


class RelearnState(NamedTuple):
    """State of :func:`relearn`.

    Attributes:
      above: int32[] – consecutive values above the limit.
      rise: float32[] – greatest multiple of the limit that the next rebase accepts.
      inner: state of the wrapped threshold.
    """

    above: jax.Array
    rise: jax.Array
    inner: Any


@threshold_factory
def relearn(
    threshold: Threshold, *, after: int, max_rise: float | jax.Array = 10.0
) -> Threshold:
    """Accepts a new level once ``after`` consecutive values were above the limit.

    A spike is short. Values that stay above the limit are a new level (a harder data
    mix, a longer batch, a higher learning rate), and a threshold that learns only
    clipped values would never accept it.

    **Rule**::

      x > limit:   above ← above + 1
      otherwise:   above ← 0, rise ← max_rise
      above = after:  state ← threshold.rebase(min(x, rise·limit), state)
                      above ← 0, rise ← rise²

    **Guarantees**

    * A level shift of up to ``max_rise`` times the limit, such as ×10, is accepted
      after ``after`` values: value number ``after`` + 1 is compared with the new level.
      A shift of ×50 takes 2·``after`` values. Each consecutive acceptance squares the
      allowed rise, so that 5·``after`` values reach 10³¹ times the level.
    * Until then, limit and state are those of ``threshold``.
    * A value that is not finite neither increments nor resets ``above``.

    **Edge cases**: a disturbance longer than ``after`` values is accepted as a level
    shift, but only up to ``max_rise`` times the limit: forty gradients with 1,000 times
    the norm do not fill Adam's second moment. If the limit is not positive (possible
    for a loss), ``max_rise`` does not apply and the new level is x.

    Args:
      threshold: the threshold to wrap.
      after: consecutive values above the limit, ≥ 1. It is a trade-off: a larger value
        resists longer disturbances, and adapts later to a lasting change.
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
    initial_rise = _validate.as_float32(max_rise)
    minimum = min if _validate.is_concrete(max_rise) else jnp.minimum
    initial_rise = minimum(initial_rise, _numerics.HUGE)

    def init():
        return RelearnState(
            above=jnp.zeros((), jnp.int32),
            rise=jnp.full((), initial_rise, jnp.float32),
            inner=threshold.init(),
        )

    def update(x, state):
        x = jnp.asarray(x)
        x = x.astype(_numerics.promote(x.dtype, _numerics.FLOAT32))
        limit, inner = threshold.update(x, state.inner)
        counted = jnp.where(x > limit, _numerics.increment(state.above), 0)
        above = jnp.where(jnp.isfinite(x), counted, state.above)
        accept = above >= after
        level = jnp.where(limit > 0, jnp.minimum(x, state.rise * limit), x)
        inner = optax.tree.where(accept, threshold.rebase(level, inner), inner)
        squared = _numerics.capped(state.rise * state.rise)
        rise = jnp.where(x <= limit, initial_rise, state.rise)
        return limit, RelearnState(
            above=jnp.where(accept, 0, above),
            rise=jnp.where(accept, squared, rise),
            inner=inner,
        )

    def rebase(x, state):
        return RelearnState(
            above=jnp.zeros_like(state.above),
            rise=jnp.full_like(state.rise, initial_rise),
            inner=threshold.rebase(x, state.inner),
        )

    return Threshold(init, update, rebase)
