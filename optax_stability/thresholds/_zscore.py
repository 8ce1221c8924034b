"""Exponential mean and deviation of a stream: ZClip."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import Threshold, is_level, prints_its_call

Mode = Literal["adaptive", "mean", "max"]

# A constant stream has no spread at all; this share of the mean stands in, so that
# rounding alone is never abnormal.
_MIN_RELATIVE_STD = 1e-6


class ZScoreState(NamedTuple):
    """State of :func:`zscore`.

    Attributes:
      step: int32[] – values learned.
      mean: float32[] – μ, mean of the learned values, in the unit of the stream.
      std: float32[] – σ, their standard deviation, same unit.
    """

    step: jax.Array
    mean: jax.Array
    std: jax.Array


def _zscore_limit(x, mean, std, z_max, mode: Mode):
    """The limit of an armed z-score threshold."""
    std = jnp.maximum(std, _MIN_RELATIVE_STD * mean)
    margin = jnp.minimum(z_max * std, _numerics.HUGE)
    boundary = mean + margin
    if mode == "max":
        return boundary
    if mode == "mean":
        return jnp.where(x > boundary, mean, boundary)
    # With z = (x − μ)/σ this is μ + z_max²·σ/z; below the boundary it is the boundary.
    excess = jnp.where(x > boundary, x - mean, margin)
    return mean + margin * (margin / jnp.maximum(excess, _numerics.TINY))


def _learn(x, state: ZScoreState, share, shrink) -> tuple[jax.Array, jax.Array]:
    """μ and σ after a value that enters with this share.

    With d = x − μ: μ ← μ + share·d and σ² ← (1 − share)·(σ² + share·shrink·d²).
    shrink = 1 is the variance of a plain average (Welford); shrink = 1 − share takes
    the distance to the mean already moved, as ZClip's exponential average does.
    """
    distance = x - state.mean
    spread = jnp.sqrt(share * shrink) * jnp.abs(distance)
    std = jnp.sqrt(1 - share) * _numerics.hypot(state.std, spread)
    return state.mean + share * distance, jnp.minimum(std, _numerics.HUGE)


@prints_its_call
def zscore(
    z_max: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int | jax.Array = 25,
    mode: Mode = "adaptive",
) -> Threshold:
    """Exponential mean and deviation of the stream: ZClip.

    **Rule**, with z = (x − μ)/σ from the values before::

      t ≤ warmup:   limit = ∞;  μ, σ = plain mean, population deviation of all values
      z ≤ z_max:    limit = μ + z_max·σ
      z > z_max:    limit = μ + z_max²·σ/z    mode "adaptive"
                    limit = μ                 mode "mean"
                    limit = μ + z_max·σ       mode "max"
      then          x' = min(x, limit)
                    μ ← decay·μ + (1 − decay)·x'
                    σ² ← decay·σ² + (1 − decay)·(x' − μ)²   with the new μ

    **Guarantees**

    * On finite, positive values it equals the paper's rule to rounding.
    * One outlier of any size moves μ by at most (1 − decay)·z_max·σ once armed.
    * Values that are not finite, or zero, leave the state as it was (a zero norm means
      "no gradient"; learned, it would forbid the next one).
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**: as published, a lasting rise is never accepted (but in mode "max"):
    limit and learned value feed each other and stay near the old mean. Adaptation time
    to a level shift of ×10 or ×50 is therefore *unbounded*; wrap it in :func:`relearn`.
    An outlier in the warm-up is learned raw and leaves the limit too high for several
    1/(1 − decay) steps; put ``clip_by_threshold(constant(max_norm))`` before it if that
    matters.

    Args:
      z_max: deviations above the mean that are still normal, > 0.
      decay: share of the average kept per value, in [0, 1).
      warmup: values averaged before the first limit, ≥ 1.
      mode: what an abnormal value is held to, see above.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` sets μ = x and σ = x/z_max, so that the limit
      starts again at 2x.

    Raises:
      ValueError: an argument is outside its range.

    References:
      Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
      arXiv:2504.02507. Deviations: σ is at least 1e-6·μ where the official code adds
      1e-6 to it; no fixed ``max_grad_norm`` on top; non-finite and zero values are not
      learned.
    """
    _validate.check_interval(
        "z_max", z_max, "(0, inf)", "2.5 is the published value, 2 is stricter"
    )
    _validate.check_interval("decay", decay, "[0, 1)", "0.97 averages about 33 values")
    _validate.check_count("warmup", warmup, 1, "25 is the published value")
    _validate.check_choice("mode", mode, get_args(Mode))
    z_max, decay = _validate.as_float32(z_max), _validate.as_float32(decay)

    def init():
        return ZScoreState(
            step=jnp.zeros((), jnp.int32),
            mean=jnp.zeros((), jnp.float32),
            std=jnp.zeros((), jnp.float32),
        )

    def update(x, state):
        x = jnp.asarray(x, jnp.float32)
        armed = state.step >= warmup
        limit = _zscore_limit(x, state.mean, state.std, z_max, mode)
        limit = jnp.where(armed, limit, jnp.inf)
        step = _numerics.increment(state.step)
        share = jnp.where(armed, 1 - decay, 1 / step.astype(jnp.float32))
        shrink = jnp.where(armed, decay, 1.0)
        mean, std = _learn(jnp.minimum(x, limit), state, share, shrink)
        learned = ZScoreState(step, mean, std)
        return limit, optax.tree.where(is_level(x), learned, state)

    def rebase(x, state):
        x = jnp.asarray(x, jnp.float32)
        step = jnp.maximum(state.step, jnp.asarray(warmup, jnp.int32))
        fresh = ZScoreState(step, x, jnp.minimum(x / z_max, _numerics.HUGE))
        return optax.tree.where(is_level(x), fresh, state)

    return Threshold(init, update, rebase)
