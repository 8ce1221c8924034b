"""Exponential mean plus standard deviations of a stream: ZClip."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import (
    Threshold,
    is_learnable,
    threshold_factory,
)

Mode = Literal["adaptive", "mean", "max"]

# Least standard deviation, as a share of the mean. A constant stream has deviation 0,
# and its rounding errors must not be abnormal.
_MIN_RELATIVE_STD = 1e-6
# Values of the warm-up that differ by more than this factor from the mean before them
# are not of one level. Choice: above what the first steps of a healthy run fall by.
_WARMUP_FACTOR = 10.0


class ZScoreState(NamedTuple):
    """State of :func:`zscore`.

    Attributes:
      step: int32[] – values learned.
      mean: float32[] – μ, mean of the learned values, in the unit of the stream.
      std: float32[] – σ, their standard deviation, same unit.
      forgotten: int32[] – values before the last start of the warm-up, which are no
        longer learned.
    """

    step: jax.Array
    mean: jax.Array
    std: jax.Array
    forgotten: jax.Array


def _zscore_limit(x, mean, std, z_max, mode: Mode):
    """The limit of a z-score threshold after its warm-up."""
    std = jnp.maximum(std, _MIN_RELATIVE_STD * mean)
    margin = _numerics.capped(z_max * std)
    boundary = mean + margin
    if mode == "max":
        return boundary
    if mode == "mean":
        return jnp.where(x > boundary, mean, boundary)
    # With z = (x − μ)/σ this is μ + z_max²·σ/z; for x below the boundary, the boundary.
    excess = jnp.where(x > boundary, x - mean, margin)
    return mean + margin * (margin / jnp.maximum(excess, _numerics.tiny(mean.dtype)))


def _warmup_limit(x, state: ZScoreState):
    """No limit, as published, unless x is of another level than the values so far."""
    limit = _WARMUP_FACTOR * state.mean
    return jnp.where((state.step > 0) & (x > limit), limit, jnp.inf)


def _starts_again(x, state: ZScoreState, warmup):
    """Whether x is so small that the warm-up before it was of another level.

    Only among the first ``warmup`` values of the stream, so that a stream that goes to
    and fro between two levels does not stay in the warm-up for ever.
    """
    early = state.step < warmup - state.forgotten
    return early & (x < state.mean / _WARMUP_FACTOR)


def _forget(state: ZScoreState) -> ZScoreState:
    """The state before the first value of a warm-up that starts again."""
    zeros = jax.tree.map(jnp.zeros_like, state)
    return zeros._replace(forgotten=state.forgotten + state.step)


def _learn(x, state: ZScoreState, share, shrink) -> tuple[jax.Array, jax.Array]:
    """Updates μ and σ with x, whose weight in the mean is ``share``.

    With d = x − μ: μ ← μ + share·d and σ² ← (1 − share)·(σ² + share·shrink·d²).
    shrink = 1 gives the variance of a plain average (Welford). shrink = 1 − share uses
    the distance to the updated mean, as ZClip's exponential average does.
    """
    distance = x - state.mean
    spread = jnp.sqrt(share * shrink) * jnp.abs(distance)
    std = jnp.sqrt(1 - share) * _numerics.hypot(state.std, spread)
    return state.mean + share * distance, _numerics.capped(std)


@threshold_factory
def zscore(
    z_max: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int | jax.Array = 25,
    mode: Mode = "adaptive",
    published: bool = False,
) -> Threshold:
    """Exponential mean plus standard deviations of the stream: ZClip.

    **Rule**, with z = (x − μ)/σ and μ, σ from past values::

      t ≤ warmup:   limit = ∞;  μ, σ = plain mean, population deviation of all values
                    x > 10·μ: limit = 10·μ, and x counts as 10·μ
                    x < μ/10: the warm-up starts again, with x as its first value,
                    if x is among the first ``warmup`` values of the stream
      z ≤ z_max:    limit = μ + z_max·σ
      z > z_max:    limit = μ + z_max²·σ/z    mode "adaptive"
                    limit = μ                 mode "mean"
                    limit = μ + z_max·σ       mode "max"
      then          x' = min(x, limit)
                    μ ← decay·μ + (1 − decay)·x'
                    σ² ← decay·σ² + (1 − decay)·(x' − μ)²   with the new μ

    **Guarantees**

    * On finite, positive values it equals the paper's rule to rounding, if no value of
      the warm-up is ten times as large, or as small, as the mean of those before it.
      With ``published=True``, it always does.
    * The warm-up ends, on any stream, after fewer than 2·warmup values; after
      ``warmup`` values if it does not start again.
    * An outlier of any size in the warm-up leaves the limit after it below six times
      the level; after the warm-up, it moves μ by at most (1 − decay)·z_max·σ.
    * Values that are zero or not finite leave the state unchanged (a zero norm means
      "no gradient"; if it were learned, the next gradient would be abnormal).
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**: as published, a lasting rise is never accepted (except in mode
    "max"): only clipped values are learned, so that mean and limit stay near the old
    level. The adaptation time to a level shift of ×10 or ×50 is therefore *unbounded*;
    wrap the threshold in :func:`relearn`. With ``published=True``, an outlier in the
    warm-up is learned without clipping: after one of 10⁴ times the level, values of a
    thousand times the level are normal for the next hundred steps.

    Args:
      z_max: limit of normal values in standard deviations above the mean, > 0.
      decay: share of the average kept per value, in [0, 1).
      warmup: number of values averaged before the first regular limit, ≥ 1.
      mode: the limit for an abnormal value, see the rule.
      published: True for the warm-up of the paper: no limit, and every value is learned
        as it is.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` sets μ = x and σ = x/z_max, so that the limit
      restarts at 2x.

    Raises:
      TypeError: ``published`` is not True or False.
      ValueError: an argument is outside its range.

    References:
      Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
      arXiv:2504.02507. Deviations: the warm-up, unless ``published``; σ is at least
      1e-6·μ, where the official code adds 1e-6 to σ; no additional fixed
      ``max_grad_norm``; non-finite and zero values are not learned.
    """
    _validate.check_interval(
        "z_max", z_max, "(0, inf)", "2.5 is the published value, 2 is stricter"
    )
    _validate.check_interval("decay", decay, "[0, 1)", "0.97 averages about 33 values")
    _validate.check_count("warmup", warmup, 1, "25 is the published value")
    _validate.check_choice("mode", mode, get_args(Mode))
    _validate.check_flags(published=published)
    z_max, decay = _validate.as_float32(z_max), _validate.as_float32(decay)

    def init():
        return ZScoreState(
            step=jnp.zeros((), jnp.int32),
            mean=jnp.zeros((), jnp.float32),
            std=jnp.zeros((), jnp.float32),
            forgotten=jnp.zeros((), jnp.int32),
        )

    def update(x, state):
        x = jnp.asarray(x, state.mean.dtype)
        armed = state.step >= warmup
        limit = _zscore_limit(x, state.mean, state.std, z_max, mode)
        early, past = jnp.inf, state
        if not published:
            early = _warmup_limit(x, state)
            starts_again = _starts_again(x, state, warmup)
            past = optax.tree.where(starts_again, _forget(state), state)
        limit = jnp.where(armed, limit, early)
        step = _numerics.increment(past.step)
        share = jnp.where(armed, 1 - decay, 1 / step.astype(x.dtype))
        shrink = jnp.where(armed, decay, 1.0)
        mean, std = _learn(jnp.minimum(x, limit), past, share, shrink)
        learned = ZScoreState(step, mean, std, past.forgotten)
        return limit, optax.tree.where(is_learnable(x), learned, state)

    def rebase(x, state):
        x = jnp.asarray(x, state.mean.dtype)
        step = jnp.maximum(state.step, jnp.asarray(warmup, jnp.int32))
        rebased = ZScoreState(step, x, _numerics.capped(x / z_max), state.forgotten)
        return optax.tree.where(is_learnable(x), rebased, state)

    return Threshold(init, update, rebase)
