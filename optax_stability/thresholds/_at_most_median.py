"""Lowers a limit to the median of the last values, so that ordinary values are evened.

*Problem*: a limit for outliers leaves ordinary norms as they are, and Adam's second
moment is the mean of their squares: steps with a large norm outvote the others. On
clean data a fixed clip below the usual norm, which evens all norms out, ends lower than
a clip of outliers alone (``python benchmarks/clean_cost.py``). But a fixed number fits
one model at one stage of training.

The first norms are the worst: they can be ten times those of thirty steps later, and
Adam remembers them for longer than that. No median of the past can foresee the fall.
So the limit begins at a small share of the median, and rises to all of it.

*Cost*: a window of a few numbers; all pairs of them are compared.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import (
    Threshold,
    check_threshold,
    is_learnable,
    threshold_factory,
)
from optax_stability.thresholds._windows import (
    WindowState,
    empty_window,
    learn_in_window,
    median,
    rescale_window,
)


class AtMostMedianState(NamedTuple):
    """State of :func:`at_most_median`.

    Attributes:
      window: :class:`WindowState` – the last values, outliers clipped.
      inner: state of the wrapped threshold.
    """

    window: WindowState
    inner: Any


def _share(count, warmup, dtype):
    """The share of the median for the value of this number, counted from 1."""
    warmup = jnp.asarray(warmup, jnp.int32)
    return jnp.minimum(count, warmup).astype(dtype) / warmup.astype(dtype)


@threshold_factory
def at_most_median(
    threshold: Threshold, *, window: int = 16, warmup: int | jax.Array = 32
) -> Threshold:
    """The limit of ``threshold``, or the median of the last values if that is lower.

    For clipping: about half of the ordinary values are above the limit, by little. They
    are no spikes, so this is no threshold for skipping.

    **Rule**, with the last n ≤ ``window`` values as they were after clipping by
    ``threshold`` alone::

      limit = min(limit of threshold, share·median)
      share = min(1, (N + 1)/warmup)     N: number of values learned so far
      x' = min(x, limit of threshold)    is learned into the window

    Before the first value is learned, x itself stands for the median.

    **Guarantees**

    * The limit is never above that of ``threshold``, whose state is the same as without
      this wrapper: what it calls an outlier, and when it accepts a new level, is
      unchanged.
    * Outliers, if they are fewer than half of a full window, do not move the median
      above an ordinary value, even if ``threshold`` lets them pass.
    * The window learns values that the median does not clip: the limit does not creep
      downwards.
    * Values that are zero or not finite are not learned.
    * Multiplying the stream by 2ᵏ multiplies every limit by 2ᵏ, if it does for
      ``threshold``.

    **Edge cases**

    * While the level falls, the median of the past is above nearly all values, and
      nothing is clipped by it; while it rises, and after ``threshold`` has accepted a
      new level, the limit lags by half a window.
    * In the first ``warmup`` steps nearly all values are clipped. Adam divides by the
      norm of what it has seen, so that its first steps are not shorter; those of an
      optimizer that does not, such as SGD, are, as in a warm-up of the learning rate.

    Args:
      threshold: the threshold to wrap.
      window: number of last values in the window, ≥ 2.
      warmup: number of first values over which the share rises, ≥ 1; 1 for the whole
        median from the first value on.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` scales the window so that its median is x, and
      rebases ``threshold``.

    Raises:
      TypeError: ``threshold`` is not a ``Threshold``, or ``window`` is traced.
      ValueError: ``window`` is less than 2, or ``warmup`` less than 1.

    Example:
      >>> from optax_stability import thresholds
      >>> threshold = at_most_median(thresholds.constant(10.0), window=3, warmup=1)
      >>> state = threshold.init()
      >>> for norm in (1.0, 3.0, 2.0, 2.5):
      ...     limit, state = threshold.update(norm, state)
      >>> print(limit)  # the median of 1, 3 and 2
      2.0

    References:
      The window is AutoClip's (arXiv:2007.14469) with its quantile at one half; the
      minimum with another rule and the rising share are ours.
    """
    check_threshold("threshold", threshold)
    _validate.check_size("window", window, 2)
    _validate.check_count("warmup", warmup, 1, "1 is for no warm-up")

    def init():
        return AtMostMedianState(empty_window(window), threshold.init())

    def update(x, state):
        past = state.window
        x = jnp.asarray(x, past.values.dtype)
        outlier_limit, inner = threshold.update(x, state.inner)
        first = jnp.where(is_learnable(x), x, jnp.inf)
        usual = jnp.where(past.step > 0, median(past.values, past.step), first)
        usual *= _share(_numerics.increment(past.step), warmup, x.dtype)
        clipped = jnp.where(jnp.isfinite(x), jnp.minimum(x, outlier_limit), x)
        learned = learn_in_window(clipped, past)
        return jnp.minimum(outlier_limit, usual), AtMostMedianState(learned, inner)

    def rebase(x, state):
        x = jnp.asarray(x, state.window.values.dtype)
        window = rescale_window(x, state.window)
        return AtMostMedianState(window, threshold.rebase(x, state.inner))

    return Threshold(init, update, rebase)
