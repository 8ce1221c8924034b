"""Averages of two noisy numbers, and an interval for the ratio of their means.

*Problem*: the noise scale is the ratio of two means, and the lower one may be close to
0. The mean of ratios is then meaningless, and so is an interval from the delta method,
which is always finite. And both means move: an average that is long enough to be sure
of is sure of the past.

*Cost*: 21 scalars per stream; element-wise.

*Source*: Fieller, "Some Problems in Interval Estimation", 1954, J. R. Stat. Soc. B 16,
§2, for the interval. West, "Updating Mean and Variance Estimates", 1979, CACM 22(9),
with weights that decay, for the averages. Lepski, "On a Problem of Adaptive Estimation
in Gaussian White Noise", 1990, Theory Probab. Appl. 35(3), for how far back to look.
Student's quantile from the normal one by
Abramowitz & Stegun, "Handbook of Mathematical Functions", 1964, eq. 26.7.5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from optax_stability._core._numerics import hypot, ratio

# From fewer steps no variance is taken: three steps under a decay count for a little
# less than three.
_FEWEST_STEPS = 2.5
# Of larger numbers the spread would overflow.
_LARGEST = 1e36
# Decays are powers of the longest one: memories of a third and a tenth of its steps.
_POWERS = (1, 3, 10)
# Memories agree if their intervals of this confidence meet. With wider ones a change is
# noticed late; with narrower ones chance looks like one, and coverage suffers.
_AGREEMENT = 0.75


class Averages(NamedTuple):
    """Weighted means of trace S and squared gradient G², with their spread.

    Each step weighs ``decay`` times the one after it. As they are learned, they have a
    first axis for memories of several lengths, the longest first. The spread is kept as
    the Cholesky factor of the weighted sums of squares and products about the means: no
    square is formed, so it has the range of S and G² themselves.

    Attributes:
      total: float32[n] – W, sum of the weights.
      total_sq: float32[n] – sum of the squared weights.
      trace: float32[n] – mean of S.
      grad_sq: float32[n] – mean of G².
      trace_spread: float32[n] – first row of the factor.
      shared_spread: float32[n] – second row, first column.
      grad_sq_spread: float32[n] – second row, second column.
    """

    total: jax.Array
    total_sq: jax.Array
    trace: jax.Array
    grad_sq: jax.Array
    trace_spread: jax.Array
    shared_spread: jax.Array
    grad_sq_spread: jax.Array

    @property
    def steps(self) -> jax.Array:
        """How many steps of equal weight would say as much, float32[n]."""
        return jnp.square(self.total) / jnp.maximum(self.total_sq, 1e-30)


class Observed(NamedTuple):
    """What one step says of each leaf.

    Attributes:
      trace: float32[n_leaves] – S; NaN where nothing is known.
      grad_sq: float32[n_leaves] – G².
      weight: float32[] – of the examples it is from.
    """

    trace: jax.Array
    grad_sq: jax.Array
    weight: jax.Array


class Interval(NamedTuple):
    """What is known of the ratio S/G².

    Attributes:
      ratio: float32[n] – ratio of the means, NaN where it is not ``valid``.
      low: float32[n] – lower end, 0 where nothing is known.
      high: float32[n] – upper end, ∞ where there is none.
      valid: bool[n] – whether G² is told from 0.
    """

    ratio: jax.Array
    low: jax.Array
    high: jax.Array
    valid: jax.Array


def init_averages(streams: int) -> Averages:
    """The averages of no step, of [memories, streams]."""
    shape = len(_POWERS), streams
    return Averages(*(jnp.zeros(shape, jnp.float32) for _ in Averages._fields))


def _givens_rotation(a, b):
    """Cosine and sine that turn (a, b) into (√(a² + b²), 0), for a ≥ 0."""
    length = hypot(a, jnp.abs(b))
    known = length > 0
    safe = jnp.where(known, length, 1.0)
    return length, jnp.where(known, a / safe, 1.0), jnp.where(known, b / safe, 0.0)


def update_averages(averages: Averages, trace, grad_sq, decay) -> Averages:
    """The averages with one more step, where both numbers are finite, up to 1e36.

    Args:
      averages: of [memories, n streams].
      trace: float32[n] – S of this step.
      grad_sq: float32[n] – G² of this step.
      decay: float32[] – weight of all that came before, relative to this step, in the
        longest memory.
    """
    old, decay = averages, decay ** jnp.array(_POWERS, jnp.float32)[:, None]
    total = decay * old.total + 1
    trace_step, grad_sq_step = trace - old.trace, grad_sq - old.grad_sq
    # The first step has no distance to a mean.
    weight = jnp.sqrt(decay * old.total / total)
    keep = jnp.sqrt(decay)
    trace_spread, cos, sin = _givens_rotation(
        keep * old.trace_spread, jnp.where(weight > 0, weight * trace_step, 0.0)
    )
    shared, beside = keep * old.shared_spread, weight * grad_sq_step
    new = Averages(
        total=total,
        total_sq=decay**2 * old.total_sq + 1,
        trace=old.trace + trace_step / total,
        grad_sq=old.grad_sq + grad_sq_step / total,
        trace_spread=trace_spread,
        shared_spread=cos * shared + sin * beside,
        grad_sq_spread=hypot(
            keep * old.grad_sq_spread, jnp.abs(cos * beside - sin * shared)
        ),
    )
    known = (jnp.abs(trace) <= _LARGEST) & (jnp.abs(grad_sq) <= _LARGEST)
    for field in new:
        known &= jnp.isfinite(field)
    return jax.tree.map(lambda after, before: jnp.where(known, after, before), new, old)


def student_quantile(confidence, dof):
    """Student's t with P(|T| < t) = confidence, for dof ≥ 1.5.

    Within 1 % for dof ≥ 2 and a confidence up to 0.95, or dof ≥ 5 and up to 0.99.
    """
    z = ndtri((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / dof ** (i + 1) for i, term in enumerate(terms))


def interval(averages: Averages, confidence) -> Interval:
    """Fieller's interval for mean(S)/mean(G²), where both means may be uncertain.

    All r for which mean(S) − r·mean(G²) is within t standard deviations of 0; of them
    those ≥ 0, as both true means are. Where mean(G²) is below 0 it counts as 0.

    Args:
      averages: of n streams.
      confidence: share of such intervals that hold the true ratio, in (0, 1).
    """
    enough = averages.steps > _FEWEST_STEPS
    steps = jnp.where(enough, averages.steps, 3.0)
    total = jnp.where(enough, averages.total, 1.0)
    # The variance of a weighted mean is Σ(x − mean)² of weight w, times this square.
    per_mean = student_quantile(confidence, steps - 1) / jnp.sqrt(total * (steps - 1))
    above, below = averages.trace, jnp.maximum(averages.grad_sq, 0)
    spreads = (
        per_mean * averages.trace_spread,
        per_mean * averages.shared_spread,
        per_mean * averages.grad_sq_spread,
    )
    # In units of the largest, no square over- or underflows.
    unit_above = jnp.maximum(jnp.abs(above), spreads[0])
    unit_below = jnp.maximum(below, jnp.maximum(jnp.abs(spreads[1]), spreads[2]))
    a, s = ratio(above, unit_above), ratio(spreads[0], unit_above)
    b, c, d = (ratio(x, unit_below) for x in (below, spreads[1], spreads[2]))

    # (a − r·b)² ≤ t²·Var(a − r·b) is q₂r² − 2q₁r + q₀ ≤ 0.
    q0, q1, q2 = (a - s) * (a + s), a * b - s * c, b * b - c * c - d * d
    # q₁² − q₀q₂, of which nothing would be left where the interval is narrow.
    root = jnp.sqrt(jnp.maximum(jnp.square(a * c - s * b) + d * d * q0, 0))
    bounded = enough & (q2 > 0)
    low = jnp.where((q0 > 0) & (q1 + root > 0), ratio(q0, q1 + root), 0.0)
    high = jnp.where(bounded, ratio(jnp.maximum(q1 + root, 0), q2), jnp.inf)
    unit = ratio(unit_above, unit_below)
    return Interval(
        ratio=jnp.where(bounded, ratio(averages.trace, averages.grad_sq), jnp.nan),
        low=jnp.where(enough & (unit_below > 0), low * unit, 0.0),
        high=jnp.where(bounded, high * unit, jnp.inf),
        valid=bounded,
    )


def longest_consistent(averages: Averages) -> Averages:
    """The averages of the longest memory that no shorter one contradicts, [n].

    A long memory knows best as long as nothing has changed. From the shortest on, each
    longer one is taken while its interval meets those of all shorter ones, and has an
    upper end if one of these has: a spike long ago, which leaves a long memory at a
    loss, is no news to a short one.
    """
    found = interval(averages, _AGREEMENT)
    shortest = len(_POWERS) - 1
    chosen = jnp.full(found.low.shape[1:], shortest)
    low, high, agree = found.low[shortest], found.high[shortest], True
    for longer in reversed(range(shortest)):
        agree &= (found.low[longer] <= high) & (found.high[longer] >= low)
        agree &= jnp.isfinite(found.high[longer]) | jnp.isinf(high)
        chosen = jnp.where(agree, longer, chosen)
        low = jnp.maximum(low, found.low[longer])
        high = jnp.minimum(high, found.high[longer])
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, chosen[None], axis=0)[0], averages
    )
