"""A multiple of the exponential mean of clipped values: AdaGC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import (
    Threshold,
    is_learnable,
    threshold_factory,
)


class EmaRatioState(NamedTuple):
    """State of :func:`ema_ratio`.

    Attributes:
      step: int32[] – values learned.
      level: float32[] – γ, in the unit of the stream: the least value of the warm-up,
        then the exponential mean of the clipped values.
    """

    step: jax.Array
    level: jax.Array


@threshold_factory
def ema_ratio(
    ratio: float | jax.Array = 1.05,
    *,
    decay: float | jax.Array = 0.98,
    warmup: int | jax.Array = 100,
) -> Threshold:
    """A multiple of the exponential mean of clipped values: AdaGC.

    **Rule**, with γ from past values::

      t ≤ warmup:  limit = ∞;          γ ← min(γ, x)
      t > warmup:  limit = ratio·γ;    γ ← decay·γ + (1 − decay)·min(x, limit)

    **Guarantees**

    * On finite, positive values it equals the paper's rule to rounding.
    * One value of any size raises γ by at most (1 − decay)·(ratio − 1): 0.1 %.
    * Values that are zero or not finite are not learned and do not count: the warm-up
      of a tensor starts at its first nonzero gradient.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**: γ starts at the *least* value of the warm-up and rises by at most
    0.1 % per value. Adaptation to a lasting rise is therefore slow: ×10 is abnormal for
    2,255 values, ×50 for 3,866. Moreover, the margin of 5 % is narrow: in a stream with
    5 % of noise, four values in ten exceed the limit. Wrap the threshold in
    :func:`relearn`, as ``clip_by_leaf_history`` does.

    Args:
      ratio: limit as a multiple of γ, > 0; choose it above 1, else γ can never rise.
      decay: share of γ kept per value, in [0, 1).
      warmup: number of learned values before the first finite limit, ≥ 1.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` sets γ = x.

    Raises:
      ValueError: an argument is outside its range.

    References:
      Wang et al., "AdaGC: Improving Training Stability for Large Language Model
      Pretraining", 2025, arXiv:2502.11034, Algorithm 1. Deviation: in the warm-up the
      paper also clips the global norm to 1, which needs another stream; the recipe
      ``adagc`` in ``examples/recipes.py`` does both.
    """
    _validate.check_interval("ratio", ratio, "(0, inf)", "1.05 is the published value")
    _validate.check_interval("decay", decay, "[0, 1)", "0.98 averages about 50 values")
    _validate.check_count("warmup", warmup, 1, "100 is the published value")
    ratio, decay = _validate.as_float32(ratio), _validate.as_float32(decay)

    def init():
        return EmaRatioState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(x, state):
        x = jnp.asarray(x, state.level.dtype)
        armed = state.step >= warmup
        limit = _numerics.capped(ratio * state.level)
        limit = jnp.where(armed, limit, jnp.inf)
        least = jnp.where(state.step > 0, jnp.minimum(state.level, x), x)
        # Written as an increment, so that the mean of a constant stream is exact.
        mean = state.level + (1 - decay) * (jnp.minimum(x, limit) - state.level)
        level = jnp.where(armed, mean, least)
        learned = EmaRatioState(_numerics.increment(state.step), level)
        return limit, optax.tree.where(is_learnable(x), learned, state)

    def rebase(x, state):
        x = jnp.asarray(x, state.level.dtype)
        step = jnp.maximum(state.step, jnp.asarray(warmup, jnp.int32))
        return optax.tree.where(is_learnable(x), EmaRatioState(step, x), state)

    return Threshold(init, update, rebase)
