"""The way out of a limit that a lasting change has made wrong."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability import _numerics, _validate
from optax_stability.thresholds._threshold import Threshold


class RelearnState(NamedTuple):
    """State of :func:`relearn`.

    Attributes:
      above: int32[] – values in a row above the limit.
      inner: state of the wrapped threshold.
    """

    above: jax.Array
    inner: Any


def relearn(threshold: Threshold, *, after: int, max_rise: float = 10.0) -> Threshold:
    """Accepts a new level once ``after`` values in a row were above the limit.

    A spike is short. What stays above the limit is the new normal (a harder data mix, a
    longer batch, a higher learning rate), and a threshold that learns only clipped
    values would never accept it.

    **Rule**::

      above ← above + 1  if x > limit,  0 otherwise
      above = after  ⇒  state ← threshold.rebase(min(x, max_rise·limit), state)
                        above ← 0

    **Guarantees**

    * A level shift of up to ``max_rise`` times the limit, so ×10, is accepted after
      ``after`` values: the value number ``after`` + 1 is judged by the new level. A
      greater one takes another row per factor: ×50 is accepted after 2·``after``.
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
    _validate.check_count("after", after, 1, "25 follows a change within 25 steps")
    _validate.check_interval("max_rise", max_rise, "(1, inf]", "10 is the default")

    def init():
        return RelearnState(jnp.zeros((), jnp.int32), threshold.init())

    def update(x, state):
        limit, inner = threshold.update(x, state.inner)
        counted = jnp.where(x > limit, _numerics.increment(state.above), 0)
        above = jnp.where(jnp.isfinite(x), counted, state.above)
        accept = above >= after
        level = jnp.where(limit > 0, jnp.minimum(x, max_rise * limit), x)
        inner = optax.tree.where(accept, threshold.rebase(level, inner), inner)
        return limit, RelearnState(jnp.where(accept, 0, above), inner)

    def rebase(x, state):
        return RelearnState(
            jnp.zeros_like(state.above), threshold.rebase(x, state.inner)
        )

    return Threshold(init, update, rebase)
