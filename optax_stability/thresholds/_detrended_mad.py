"""Far above the trend, in units of the usual distance from it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate
from optax_stability.thresholds._threshold import Threshold, is_level, prints_its_call
from optax_stability.thresholds._windows import median, push

# The median of |e| of normal noise, times this, is its standard deviation.
_DEVIATION_PER_MEDIAN = 1.4826
# In log mode: before a spread is known, a value this many floors above the centre is
# abnormal; and this many are, whatever the spread.
_UNARMED_FLOORS = 2
_MOST_FLOORS = 4


class DetrendedMadState(NamedTuple):
    """State of :func:`detrended_mad`; in log mode everything is in log x.

    Attributes:
      step: int32[] – values learned.
      values: float32[centre] – the last of them, newest last.
      residuals: float32[window] – the last distances from the centre, newest last.
    """

    step: jax.Array
    values: jax.Array
    residuals: jax.Array


def _spread(residuals, count):
    """The deviation of the residuals about their median.

    A centre that lags behind a falling stream makes all residuals negative alike: about
    zero that would be read as spread.
    """
    distances = jnp.abs(residuals - median(residuals, count))
    return _DEVIATION_PER_MEDIAN * median(distances, count)


def _learn(x, centre, state: DetrendedMadState) -> DetrendedMadState:
    # Half the range, so that the distance between two residuals fits as well.
    most = _numerics.HUGE / 2
    return DetrendedMadState(
        step=_numerics.increment(state.step),
        values=push(state.values, x),
        residuals=push(state.residuals, jnp.clip(x - centre, -most, most)),
    )


def _log(factor):
    """The logarithm; of a plain number a plain number, no array for a closure."""
    return math.log(factor) if _validate.is_concrete(factor) else jnp.log(factor)


@prints_its_call
def detrended_mad(
    num_mads: float | jax.Array = 6.0,
    *,
    floor: float | jax.Array,
    centre: int = 8,
    window: int = 32,
    arm: int = 24,
    log: bool = True,
) -> Threshold:
    """Far above the trend, in units of the usual distance from it.

    A window of raw values is blind while the stream falls: the fall is read as spread.
    Here the centre follows the trend, and the spread is that of the residuals.

    **Rule**, on x, or on log x with ``log``; all from the values before x::

      c = median of the last ``centre`` values
      s = 1.4826·median|eᵢ − median(e)|   over the last ``window`` residuals
      limit = c + max(num_mads·s, floor)
      log:    c + min(max(num_mads·s, log floor), 4·log floor)
      learned: x' = min(x, limit), e = x' − c

    Until ``arm`` values were learned there is no spread to trust. The limit is then ∞;
    with ``log``, c + 2·log(floor): 25 times the centre with a floor of 5, so that a
    gradient of 1e30 in the warm-up does not pass. Before the first value it is ∞.

    **Guarantees**

    * One value of any size shifts the medians by one rank, no more.
    * A stream that falls steadily is judged as one that stands still.
    * With ``log``, what is floor⁴ times the centre (625 with a floor of 5) is abnormal
      however wide the spread.
    * A constant stream, and one whose jitter is within the floor, is normal.
    * Values that are not finite are not learned; with ``log`` neither is 0.

    **Edge cases**

    * The very first value is normal whatever it is, and the first is what the next
      ones are compared with.
    * What is learned of a value above the limit is the limit. A level shift is so
      followed by steps of the margin: on a stream with 5 % of noise and
      ``detrended_mad(5.0, floor=5.0)``, ×10 is abnormal for 4 or 5 values, ×50 for 9,
      ×10,000 for 16.
    * A floor within the noise makes the first regular limits too tight, because the
      limit before them holds values down: choose one well above the usual scatter.
    * Without ``log`` values may be negative.

    Args:
      num_mads: deviations above the centre that are still normal, > 0.
      floor: least margin. With ``log`` a factor > 1: 5 lets every norm pass that is
        less than five times the centre. Without, a distance > 0: 0.5 is half a nat.
      centre: values that the centre is the median of, ≥ 1.
      window: residuals that the spread comes from, ≥ 2.
      arm: values learned before the first regular limit, ≥ 2.
      log: work on log x, for what is positive and varies by factors (norms); False for
        losses.

    Returns:
      A :class:`Threshold`. ``rebase(x)`` puts the centre at x and keeps the spread.

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
      Ours. The scale is the median absolute deviation (Hampel 1974). How it compares
      with the published rules: ``python benchmarks/spike_detection.py``.
    """
    _validate.check_interval("num_mads", num_mads, "(0, inf)", "5 and 6 are usual")
    allowed = "(1, inf)" if log else "(0, inf)"
    remedy = "5 is five times the centre" if log else "0.5 is half a nat"
    _validate.check_interval("floor", floor, allowed, remedy)
    for name, size, least in (("centre", centre, 1), ("window", window, 2)):
        _validate.check_size(name, size, least)
    _validate.check_count("arm", arm, 2, "24 is the default")
    num_mads, floor = _validate.as_float32(num_mads), _validate.as_float32(floor)
    least_margin = _log(floor) if log else floor
    unarmed_margin = _UNARMED_FLOORS * least_margin if log else jnp.inf
    most_margin = _MOST_FLOORS * least_margin if log else jnp.inf

    def init():
        return DetrendedMadState(
            step=jnp.zeros((), jnp.int32),
            values=jnp.zeros((centre,), jnp.float32),
            residuals=jnp.zeros((window,), jnp.float32),
        )

    def read(x):
        """The value on the scale of the rule, and whether it can be learned."""
        x = jnp.asarray(x, jnp.float32)
        if not log:
            return x, jnp.isfinite(x)
        return jnp.log(jnp.maximum(x, _numerics.TINY)), is_level(x)

    def update(x, state):
        x, known = read(x)
        middle = jnp.where(state.step > 0, median(state.values, state.step), x)
        # The first value had no centre to be distant from.
        spread = _spread(state.residuals, state.step - 1)
        margin = jnp.clip(num_mads * spread, least_margin, most_margin)
        margin = jnp.where(state.step >= arm, margin, unarmed_margin)
        limit = jnp.where(state.step > 0, middle + margin, jnp.inf)
        learned = _learn(jnp.minimum(x, limit), middle, state)
        state = optax.tree.where(known, learned, state)
        return jnp.exp(limit) if log else limit, state

    def rebase(x, state):
        x, known = read(x)
        fresh = state._replace(
            step=jnp.maximum(state.step, 1), values=jnp.full_like(state.values, x)
        )
        return optax.tree.where(known, fresh, state)

    return Threshold(init, update, rebase)
