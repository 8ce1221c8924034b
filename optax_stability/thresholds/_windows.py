"""Thresholds from a window of the last values: deviation, quantile, median.

*Cost*: state and work O(window); a window of 128 is 0.5 kB.
"""

from collections.abc import Callable
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

# Least standard deviation, as a share of the mean; see zscore.
_MIN_RELATIVE_STD = 1e-6
# A value that was learned before the rule is armed counts as at most this multiple of
# the median.
_FIRST_VALUES_FACTOR = 10.0
# Longer windows are sorted; up to this length all pairs are compared.
_LONG = 64


class WindowState(NamedTuple):
    """State of the window thresholds.

    Attributes:
      step: int32[] – values learned.
      values: float32[window] – the last learned values, newest last; empty slots are 0.
    """

    step: jax.Array
    values: jax.Array


def push(values, x):
    """Drops the oldest value of the window and appends x."""
    return jnp.append(values[1:], x)


def filled(values, count) -> jax.Array:
    """Which slots hold one of the ``count`` learned values, bool[window]."""
    size = values.shape[0]
    return jnp.arange(size, dtype=jnp.int32) >= size - count


def _order_statistics(values, count, ranks: list) -> list[jax.Array]:
    """The learned values of these ranks, from 0 for the smallest."""
    padded = jnp.where(filled(values, count), values, _numerics.huge(values.dtype))
    if values.shape[0] > _LONG:
        ordered = jnp.sort(padded)
        return [ordered[rank] for rank in ranks]
    # The value of rank r is the smallest with more than r values up to it. A sort would
    # be several kernels on a GPU.
    up_to = jnp.sum(padded[None, :] <= padded[:, None], axis=1, dtype=jnp.int32)
    return [jnp.min(padded, where=up_to > r, initial=jnp.inf) for r in ranks]


def quantile(values, count, q):
    """The q-quantile of the learned values, with linear interpolation."""
    size = jnp.clip(count, 1, values.shape[0])
    position = q * (size - 1).astype(values.dtype)
    below = jnp.floor(position).astype(jnp.int32)
    ranks = [below, jnp.minimum(below + 1, size - 1)]
    low, high = _order_statistics(values, count, ranks)
    return low + (position - below.astype(values.dtype)) * (high - low)


def median(values, count):
    """The median of the learned values."""
    size = jnp.clip(count, 1, values.shape[0])
    low, high = _order_statistics(values, count, [(size - 1) >> 1, size >> 1])
    return low + (high / 2 - low / 2)


def _mean_and_std(values, count):
    """Mean and sample standard deviation (n − 1) of the learned values."""
    mask = filled(values, count)
    size = jnp.clip(count, 1, values.shape[0]).astype(values.dtype)
    largest = jnp.max(values)
    # Sums and squares of ratios to the largest value cannot overflow.
    ratios = _numerics.relative_to(values, largest)
    mean = jnp.sum(jnp.where(mask, ratios, 0.0)) / size
    distances = jnp.where(mask, ratios - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(distances)) / jnp.maximum(size - 1, 1))
    return mean * largest, std * largest


def _without_first_spikes(values, count):
    """Clips the values of the first half window, which no limit could clip, if larger.

    They are clipped to ten times the median of all learned values.
    """
    size = values.shape[0]
    is_first = jnp.arange(size, dtype=jnp.int32) - size + count < size // 2
    limit = _FIRST_VALUES_FACTOR * median(values, count)
    return jnp.where(is_first & (values > limit), limit, values)


def empty_window(window: int) -> WindowState:
    """The state before the first value."""
    values = jnp.zeros((window,), jnp.float32)
    return WindowState(step=jnp.zeros((), jnp.int32), values=values)


def learn_in_window(x, state: WindowState) -> WindowState:
    """The state after x, if x can be learned."""
    learned = WindowState(_numerics.increment(state.step), push(state.values, x))
    return optax.tree.where(is_learnable(x), learned, state)


def rescale_window(x, state: WindowState) -> WindowState:
    """Scales the window so that its median is x; the relative spread is kept."""
    relative = _numerics.relative_to(state.values, median(state.values, state.step))
    values = jnp.where(state.values > 0, relative * x, 0.0)
    rescaled = WindowState(state.step, _numerics.capped(values))
    known = is_learnable(x) & (state.step > 0)
    return optax.tree.where(known, rescaled, learn_in_window(x, state))


def _window_threshold(window: int, limit_of: Callable) -> Threshold:
    """A threshold with the limit ``limit_of(values, count)`` of its window."""
    _validate.check_size("window", window, 2)

    def update(x, state):
        x = jnp.asarray(x, state.values.dtype)
        limit = _numerics.capped(limit_of(state.values, state.step))
        limit = jnp.where(state.step >= window // 2, limit, jnp.inf)
        return limit, learn_in_window(x, state)

    def rebase(x, state):
        return rescale_window(jnp.asarray(x, state.values.dtype), state)

    return Threshold(lambda: empty_window(window), update, rebase)


@threshold_factory
def window_zscore(
    num_sigmas: float | jax.Array = 6.0, *, window: int = 128, published: bool = False
) -> Threshold:
    """Mean plus standard deviations of the last values: the rule of OLMo-core.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = mean + num_sigmas·std,  std² = Σ(xᵢ − mean)²/(n − 1)
      limit = ∞                       while n < window // 2
      xᵢ of the first window // 2 values of the stream count as at most 10·median(x)

    **Guarantees**

    * On finite, positive values it equals the published rule to rounding, if none of
      the first ``window // 2`` is above ten times the median. With ``published=True``,
      it always does.
    * Values that are zero or not finite are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**

    * A value above the limit is learned *without clipping*, as published: it increases
      the deviation, and for ``window`` values the next outlier may not be detected.
      Before there is a limit, this is not so: one spike in the first half window
      leaves the limit below nine times the level.
    * While the stream falls, spikes can be missed: the trend increases the deviation.
    * After a lasting rise by any factor, ×10 and ×50 alike, 4 values are abnormal
      (window / (num_sigmas² + 1), rounded up).

    Args:
      num_sigmas: limit in sample standard deviations above the mean, > 0.
      window: number of last values in the window, ≥ 2.
      published: True to count the first values as they are, like all others.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced, or ``published`` is not True or False.

    References:
      OLMo-core ``SkipStepOptimizer``; the same rule in MaxText and Levanter (which
      divides by n). Deviations: the first values, unless ``published``; the limit is
      finite after ``window // 2`` values before the present one, where OLMo-core counts
      the present one too; std is at least 1e-6·mean; values that are not finite are not
      learned (in OLMo-core one NaN disables the rule for a window).
    """
    _validate.check_interval("num_sigmas", num_sigmas, "(0, inf)", "6 is usual")
    _validate.check_flags(published=published)
    num_sigmas = _validate.as_float32(num_sigmas)

    def limit_of(values, count):
        if not published:
            values = _without_first_spikes(values, count)
        mean, std = _mean_and_std(values, count)
        return mean + num_sigmas * jnp.maximum(std, _MIN_RELATIVE_STD * mean)

    return _window_threshold(window, limit_of)


@threshold_factory
def window_quantile(q: float | jax.Array, *, window: int = 128) -> Threshold:
    """A quantile of the last values: AutoClip.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = q-quantile, with linear interpolation
      limit = ∞            while n < window // 2

    **Guarantees**

    * For the first ``window`` values it equals the published rule, applied to past
      values, to rounding.
    * Values that are zero or not finite are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**

    * A share of 1 − q of a steady stream is above the limit: with the small q of the
      paper (0.1) this normalises the gradient; it does not detect spikes.
    * Values are learned without clipping. A lasting rise by any factor, ×10 and ×50
      alike, is abnormal for (1 − q)·window values: 14 at q = 0.9, 116 at q = 0.1.

    Args:
      q: share of the values that is normal, in (0, 1].
      window: number of last values in the window, ≥ 2.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced.

    References:
      Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks", 2020, arXiv:2007.14469, Algorithm 1. Deviations: the last ``window``
      values instead of all; the present value is compared with the limit before it is
      learned; the limit is infinite until half the window is filled.
    """
    _validate.check_interval("q", q, "(0, 1]", "0.1 is the paper's percentile 10")
    q = _validate.as_float32(q)
    return _window_threshold(window, lambda values, count: quantile(values, count, q))


@threshold_factory
def window_median(ratio: float | jax.Array, *, window: int = 128) -> Threshold:
    """A multiple of the median of the last values.

    **Rule**, over the last n ≤ ``window`` values before x::

      limit = ratio·median
      limit = ∞             while n < window // 2

    **Guarantees**

    * Outliers, if they are fewer than half of a full window, do not move the limit
      above ``ratio`` times a normal value.
    * Values that are zero or not finite are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ.

    **Edge cases**: values are learned without clipping. A lasting rise by more than
    ``ratio``, ×10 and ×50 alike, is abnormal for half a window: 64 values.

    Args:
      ratio: limit as a multiple of the median, > 0.
      window: number of last values in the window, ≥ 2.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x.

    Raises:
      ValueError: an argument is outside its range.
      TypeError: ``window`` is traced.

    References:
      ScaledAdam of icefall (``clipping_scale`` 2). Deviation: at every step the present
      value is compared with the limit before it is learned.
    """
    _validate.check_interval("ratio", ratio, "(0, inf)", "2 clips, 20 detects spikes")
    ratio = _validate.as_float32(ratio)
    return _window_threshold(
        window, lambda values, count: ratio * median(values, count)
    )
