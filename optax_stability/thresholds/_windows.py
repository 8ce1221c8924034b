"""Thresholds from the last values of a stream: deviation, quantile, median.

*Cost*: state and work O(window); a window of 128 is 0.5 kB.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import Threshold, is_level, prints_its_call

# Stands in for the spread of a stream that has none, as in zscore.
_MIN_RELATIVE_STD = 1e-6


class WindowState(NamedTuple):
    """State of the window thresholds.

    Attributes:
      step: int32[] – values learned.
      values: float32[window] – the last of them, newest last, zeros where none is yet.
    """

    step: jax.Array
    values: jax.Array


def push(values, x):
    """The window one value later: the oldest leaves, x comes last."""
    return jnp.append(values[1:], x)


def filled(values, count) -> jax.Array:
    """Which slots hold one of the ``count`` values learned, bool[window]."""
    size = values.shape[0]
    return jnp.arange(size) >= size - count


def _ordered(values, count):
    """The values learned in ascending order, then the empty slots; and how many."""
    kept = jnp.where(filled(values, count), values, _numerics.HUGE)
    return jnp.sort(kept), jnp.clip(count, 1, values.shape[0])


def quantile(values, count, q):
    """The q-quantile of the values learned, linear between two of them."""
    ordered, size = _ordered(values, count)
    place = q * (size - 1)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, size - 1)]
    return low + (place - below) * (high - low)


def median(values, count):
    """The median of the values learned."""
    ordered, size = _ordered(values, count)
    low, high = ordered[(size - 1) // 2], ordered[size // 2]
    return low + (high / 2 - low / 2)


def _mean_and_std(values, count):
    """Mean and sample deviation (n − 1) of the values learned."""
    known, size = filled(values, count), jnp.clip(count, 1, values.shape[0])
    largest = jnp.max(values)
    # Relative to the largest, neither sum nor square can overflow.
    ratios = _numerics.relative_to(values, largest)
    mean = jnp.sum(jnp.where(known, ratios, 0.0)) / size
    distances = jnp.where(known, ratios - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(distances)) / jnp.maximum(size - 1, 1))
    return mean * largest, std * largest


def _learn(x, state: WindowState) -> WindowState:
    return WindowState(_numerics.increment(state.step), push(state.values, x))


def _move_to(x, state: WindowState) -> WindowState:
    """The window scaled so that its median is x: its relative spread is kept."""
    relative = _numerics.relative_to(state.values, median(state.values, state.step))
    values = jnp.where(state.values > 0, relative * x, 0.0)
    moved = WindowState(state.step, jnp.minimum(values, _numerics.HUGE))
    return optax.tree.where(state.step > 0, moved, _learn(x, state))


def _window(window: int, limit_of: Callable) -> Threshold:
    """A threshold whose limit is ``limit_of(values, count)`` of its window."""
    _validate.check_size("window", window, 2)

    def init():
        return WindowState(
            step=jnp.zeros((), jnp.int32), values=jnp.zeros((window,), jnp.float32)
        )

    def update(x, state):
        x = jnp.asarray(x, jnp.float32)
        limit = jnp.minimum(limit_of(state.values, state.step), _numerics.HUGE)
        limit = jnp.where(state.step >= window // 2, limit, jnp.inf)
        return limit, optax.tree.where(is_level(x), _learn(x, state), state)

    def rebase(x, state):
        x = jnp.asarray(x, jnp.float32)
        return optax.tree.where(is_level(x), _move_to(x, state), state)

    return Threshold(init, update, rebase)


@prints_its_call
def window_zscore(
    num_sigmas: float | jax.Array = 6.0, *, window: int = 128
) -> Threshold:
    """Mean and deviation of the last values: the rule of OLMo-core and its ports.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = mean + num_sigmas·std,  std² = Σ(xᵢ − mean)²/(n − 1)
      limit = ∞                       while n < window // 2

    **Guarantees**

    * On finite, positive values it equals the published rule to rounding.
    * Values that are not finite, or zero, are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**

    * A value above the limit is learned *raw*, as published: it widens the deviation
      and hides the next one for ``window`` values.
    * Blind while the stream falls: the fall itself is read as spread.
    * Adaptation to a lasting rise by any factor, ×10 and ×50 alike: 4 values are
      abnormal (window / (num_sigmas² + 1), rounded up).

    Args:
      num_sigmas: sample deviations above the mean that are still normal, > 0.
      window: values remembered, ≥ 2.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced.

    References:
      OLMo-core ``SkipStepOptimizer``; the same rule in MaxText and Levanter (which
      divides by n). Deviations: armed by ``window // 2`` values before the present one,
      where OLMo-core counts the present one too; std is at least 1e-6·mean; values that
      are not finite are not learned (there, one NaN disables the rule for a window).
    """
    _validate.check_interval("num_sigmas", num_sigmas, "(0, inf)", "6 is usual")
    num_sigmas = _validate.as_float32(num_sigmas)

    def limit_of(values, count):
        mean, std = _mean_and_std(values, count)
        return mean + num_sigmas * jnp.maximum(std, _MIN_RELATIVE_STD * mean)

    return _window(window, limit_of)


@prints_its_call
def window_quantile(q: float | jax.Array, *, window: int = 128) -> Threshold:
    """A quantile of the last values: AutoClip.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = q-quantile, linear between two values
      limit = ∞            while n < window // 2

    **Guarantees**

    * While fewer than ``window`` values were seen it equals the published rule applied
      to the past, to rounding.
    * Values that are not finite, or zero, are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**

    * A share of 1 − q of a steady stream is above the limit: with the small q of the
      paper (0.1) this normalises the gradient, it does not look for spikes.
    * Learns raw values. A lasting rise by any factor, ×10 and ×50 alike, is abnormal
      for (1 − q)·window values: 14 at q = 0.9, 116 at q = 0.1.

    Args:
      q: share of the values that is normal, in (0, 1].
      window: values remembered, ≥ 2.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced.

    References:
      Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks", 2020, arXiv:2007.14469, Algorithm 1. Deviations: the last ``window``
      values instead of all; the present one is judged before it is learned; nothing is
      clipped until half the window is known.
    """
    _validate.check_interval("q", q, "(0, 1]", "0.1 is the paper's percentile 10")
    q = _validate.as_float32(q)
    return _window(window, lambda values, count: quantile(values, count, q))


@prints_its_call
def window_median(ratio: float | jax.Array, *, window: int = 128) -> Threshold:
    """A multiple of the median of the last values.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = ratio·median
      limit = ∞             while n < window // 2

    **Guarantees**

    * One outlier, or any number below half of a full window, does not move the limit
      beyond ``ratio`` times a normal value.
    * Values that are not finite, or zero, are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**: learns raw values. A lasting rise by more than ``ratio``, ×10 and
    ×50 alike, is abnormal for half a window: 64 values.

    Args:
      ratio: limit as a multiple of the median, > 0.
      window: values remembered, ≥ 2.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced.

    References:
      ScaledAdam of icefall (``clipping_scale`` 2). Deviation: the present value is
      judged before it is learned, at every step.
    """
    _validate.check_interval("ratio", ratio, "(0, inf)", "2 clips, 20 looks for spikes")
    ratio = _validate.as_float32(ratio)
    return _window(window, lambda values, count: ratio * median(values, count))
