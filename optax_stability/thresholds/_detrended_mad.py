"""A limit above a moving median, in units of the median absolute deviation."""

import math
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
from optax_stability.thresholds._windows import median, push

# For normal noise e, the standard deviation is this factor times the median of |e|.
_DEVIATION_PER_MEDIAN = 1.4826
# The margin in log mode, in multiples of log floor.
_UNARMED_FLOORS = 2  # Before the spread is known.
_MAX_FLOORS = 4  # The upper bound for any spread.


class DetrendedMadState(NamedTuple):
    """State of :func:`detrended_mad`; in log mode, values and residuals are of log x.

    Attributes:
      step: int32[] – values learned.
      values: float32[centre] – the last learned values, newest last.
      residuals: float32[window] – the last distances from the centre, newest last.
    """

    step: jax.Array
    values: jax.Array
    residuals: jax.Array


def _spread(residuals, count):
    """The scaled median absolute deviation of the residuals from their median.

    The centre lags behind a falling stream, so that all residuals are negative. The
    deviation from 0 would then count this lag as spread.
    """
    distances = jnp.abs(residuals - median(residuals, count))
    return _DEVIATION_PER_MEDIAN * median(distances, count)


def _learn(x, centre, state: DetrendedMadState) -> DetrendedMadState:
    # Half the range, so that the distance between two residuals fits as well.
    bound = _numerics.huge(x.dtype) / 2
    return DetrendedMadState(
        step=_numerics.increment(state.step),
        values=push(state.values, x),
        residuals=push(state.residuals, jnp.clip(x - centre, -bound, bound)),
    )


def _log(factor):
    """The logarithm; a plain number stays one, so that no closure holds an array."""
    return math.log(factor) if _validate.is_concrete(factor) else jnp.log(factor)


@threshold_factory
def detrended_mad(
    num_mads: float | jax.Array = 6.0,
    *,
    floor: float | jax.Array,
    centre: int = 8,
    window: int = 32,
    arm: int = 24,
    log: bool = True,
) -> Threshold:
    """A limit above a moving median, in units of the median absolute deviation (MAD).

    While a stream falls, a window of raw values misses spikes: it counts the trend as
    spread. Here the centre follows the trend, and the spread is that of the residuals.

    **Rule**, for x, or for log x with ``log``; all from the values before x::

      c = median of the last ``centre`` values
      s = 1.4826·median|eᵢ − median(e)|   over the last ``window`` residuals
      limit = c + max(num_mads·s, floor)
      log:    c + min(max(num_mads·s, log floor), 4·log floor)
      learned: x' = min(x, limit), e = x' − c

    Until ``arm`` values were learned, the spread is not reliable. The limit is then ∞;
    with ``log``, c + 2·log(floor): 25 times the centre with a floor of 5, so that a
    gradient of 1e30 in the warm-up is abnormal. Before the first value the limit is ∞.

    **Guarantees**

    * One value of any size shifts each median by at most one rank.
    * A steady fall of the stream does not increase the spread.
    * With ``log``, a value above floor⁴ times the centre (625 with a floor of 5) is
      abnormal for any spread.
    * A constant stream, and a stream whose noise is within the floor, is normal.
    * Values that are not finite are not learned; with ``log``, 0 is not learned either.

    **Edge cases**

    * The first value is always normal, and the next values are compared with it.
    * A value above the limit is learned as the limit. The centre therefore follows a
      level shift in steps of the margin: for a stream with 5 % of noise and
      ``detrended_mad(5.0, floor=5.0)``, ×10 is abnormal for 4 or 5 values, ×50 for 9,
      ×10,000 for 16.
    * A floor within the noise makes the first regular limits too tight, because the
      limit before them clips the learned values: choose a floor well above the noise.
    * Without ``log``, values may be negative.

    Args:
      num_mads: limit in scaled MADs above the centre, > 0.
      floor: least margin. With ``log``, a factor > 1: at 5, every norm below five times
        the centre is normal. Without ``log``, a distance > 0: 0.5 is half a nat.
      centre: number of last values whose median is the centre, ≥ 1.
      window: number of last residuals from which the spread is computed, ≥ 2.
      arm: number of learned values before the first regular limit, ≥ 2.
      log: True to use log x, for positive values that vary by factors (norms); False
        for losses.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` sets the centre to x and keeps the spread.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> threshold = detrended_mad(6.0, floor=0.5, log=False)
      >>> state = threshold.init()
      >>> for step in range(40):
      ...     limit, state = threshold.update(8.0 - 0.1 * step, state)
      >>> print(f"{limit:.2f}")  # the loss is 4.1, its centre lags by 4.5 steps
      5.05

    References:
      Original to this library. The scale is the median absolute deviation (Hampel,
      "The Influence Curve and Its Role in Robust Estimation", 1974, JASA 69).
      Comparison with the published rules: ``python benchmarks/spike_detection.py``.
    """
    _validate.check_flags(log=log)
    _validate.check_interval("num_mads", num_mads, "(0, inf)", "5 and 6 are usual")
    allowed = "(1, inf)" if log else "(0, inf)"
    remedy = "5 is five times the centre" if log else "0.5 is half a nat"
    _validate.check_interval("floor", floor, allowed, remedy)
    for name, size, minimum in (("centre", centre, 1), ("window", window, 2)):
        _validate.check_size(name, size, minimum)
    _validate.check_count("arm", arm, 2, "24 is the default")
    num_mads, floor = _validate.as_float32(num_mads), _validate.as_float32(floor)
    min_margin = _log(floor) if log else floor
    unarmed_margin = _UNARMED_FLOORS * min_margin if log else jnp.inf
    max_margin = _MAX_FLOORS * min_margin if log else jnp.inf

    def init():
        return DetrendedMadState(
            step=jnp.zeros((), jnp.int32),
            values=jnp.zeros((centre,), jnp.float32),
            residuals=jnp.zeros((window,), jnp.float32),
        )

    def transform(x, state):
        """The value on the scale of the rule, and whether it can be learned."""
        x = jnp.asarray(x, state.values.dtype)
        if not log:
            return x, jnp.isfinite(x)
        return jnp.log(jnp.maximum(x, _numerics.tiny(x.dtype))), is_learnable(x)

    def update(x, state):
        x, learnable = transform(x, state)
        centre_value = jnp.where(state.step > 0, median(state.values, state.step), x)
        # The first value has no residual, because there was no centre before it.
        spread = _spread(state.residuals, state.step - 1)
        margin = jnp.clip(num_mads * spread, min_margin, max_margin)
        margin = jnp.where(state.step >= arm, margin, unarmed_margin)
        limit = jnp.where(state.step > 0, centre_value + margin, jnp.inf)
        learned = _learn(jnp.minimum(x, limit), centre_value, state)
        state = optax.tree.where(learnable, learned, state)
        return jnp.exp(limit) if log else limit, state

    def rebase(x, state):
        x, learnable = transform(x, state)
        rebased = state._replace(
            step=jnp.maximum(state.step, 1), values=jnp.full_like(state.values, x)
        )
        return optax.tree.where(learnable, rebased, state)

    return Threshold(init, update, rebase)
