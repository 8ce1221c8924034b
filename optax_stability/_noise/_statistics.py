"""Averages of two noisy numbers, and an interval for the ratio of their means.

*Problem*: the noise scale is the ratio of two means, and the denominator may be close
to 0. The mean of ratios is then meaningless, and so is an interval from the delta
method, which is always finite.

*Cost*: 7 scalars per stream; element-wise.

*Source*: Fieller, "Some Problems in Interval Estimation", 1954, J. R. Stat. Soc. B 16,
§2, for the interval. West, "Updating Mean and Variance Estimates", 1979, CACM 22(9),
with weights that decay, for the averages. Student's quantile from the normal one by
Abramowitz & Stegun, "Handbook of Mathematical Functions", 1964, eq. 26.7.5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from optax_stability._core._numerics import hypot, ratio

# Fewer effective steps give no variance. The limit is below 3 because three steps with
# decaying weights count for a little less than three.
_FEWEST_STEPS = 2.5
# The spread of larger numbers would overflow.
_LARGEST = 1e36


class Averages(NamedTuple):
    """Weighted means of trace S and squared gradient G², with their spread.

    Each step has ``decay`` times the weight of the next. The spread is stored as the
    Cholesky factor of the weighted sums of squares and products about the means: no
    square is formed, so the spread has the range of S and G² themselves.

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
        """The equivalent number of steps of equal weight, float32[n]."""
        return jnp.square(self.total) / jnp.maximum(self.total_sq, 1e-30)


class Observed(NamedTuple):
    """S and G² of each leaf, from one step.

    Attributes:
      trace: float32[n_leaves] – S; not finite where there is no observation.
      grad_sq: float32[n_leaves] – G², likewise.
      weight: float32[] – N, total weight of the examples.
      parts: float32[] – K, the number of parts that were compared.
    """

    trace: jax.Array
    grad_sq: jax.Array
    weight: jax.Array
    parts: jax.Array


class Interval(NamedTuple):
    """The ratio S/G², with a confidence interval.

    Attributes:
      ratio: float32[n] – ratio of the means, 0 where it is not ``valid``.
      low: float32[n] – lower end, 0 where it is unknown.
      high: float32[n] – upper end, ∞ where there is none.
      valid: bool[n] – whether G² can be distinguished from 0.
      signal_low: float32[n] – lower end of the interval of G²/S: the inverse of
        ``high``, or a number ≤ 0 where there is no upper end.
    """

    ratio: jax.Array
    low: jax.Array
    high: jax.Array
    valid: jax.Array
    signal_low: jax.Array


def init_averages(streams: int) -> Averages:
    """The averages before the first step."""
    return Averages(*(jnp.zeros(streams, jnp.float32) for _ in Averages._fields))


def _givens_rotation(a, b):
    """Length √(a² + b²), and cosine and sine that turn (a, b) to (length, 0); a ≥ 0."""
    length = hypot(a, jnp.abs(b))
    known = length > 0
    safe = jnp.where(known, length, 1.0)
    return length, jnp.where(known, a / safe, 1.0), jnp.where(known, b / safe, 0.0)


def is_learnable(trace, grad_sq) -> jax.Array:
    """Whether both numbers are finite, and small enough for their spread."""
    return (jnp.abs(trace) <= _LARGEST) & (jnp.abs(grad_sq) <= _LARGEST)


def update_averages(averages: Averages, trace, grad_sq, decay) -> Averages:
    """Adds one step to the averages, where both numbers are finite and at most 1e36.

    Args:
      averages: of n streams.
      trace: float32[n] – S of this step.
      grad_sq: float32[n] – G² of this step.
      decay: float32[] – weight of the earlier steps relative to this one.
    """
    learnable = is_learnable(trace, grad_sq)
    trace, grad_sq = (jnp.where(learnable, x, 0.0) for x in (trace, grad_sq))
    old = averages
    total = decay * old.total + 1
    trace_step, grad_sq_step = trace - old.trace, grad_sq - old.grad_sq
    # 0 at the first step, when there is no mean yet.
    weight = jnp.sqrt(decay * old.total / total)
    root_decay = jnp.sqrt(decay)
    trace_spread, cos, sin = _givens_rotation(
        root_decay * old.trace_spread, jnp.where(weight > 0, weight * trace_step, 0.0)
    )
    shared, added = root_decay * old.shared_spread, weight * grad_sq_step
    new = Averages(
        total=total,
        total_sq=decay**2 * old.total_sq + 1,
        trace=old.trace + trace_step / total,
        grad_sq=old.grad_sq + grad_sq_step / total,
        trace_spread=trace_spread,
        shared_spread=cos * shared + sin * added,
        grad_sq_spread=hypot(
            root_decay * old.grad_sq_spread, jnp.abs(cos * added - sin * shared)
        ),
    )
    known = learnable
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


def student(averages: Averages, confidence) -> tuple[jax.Array, jax.Array]:
    """Whether there are enough steps for an interval, and Student's t for them."""
    enough = averages.steps > _FEWEST_STEPS
    return enough, student_quantile(
        confidence, jnp.where(enough, averages.steps, 3.0) - 1
    )


def interval(averages: Averages, confidence) -> Interval:
    """Fieller's interval for mean(S)/mean(G²), where both means may be uncertain.

    The interval contains all r ≥ 0 for which mean(S) − r·mean(G²) is within t standard
    deviations of 0; r ≥ 0 because both true means are. A negative mean(G²) counts as 0.

    Args:
      averages: of n streams.
      confidence: fraction of intervals that contain the true ratio, in (0, 1).
    """
    enough, quantile = student(averages, confidence)
    steps = jnp.where(enough, averages.steps, 3.0)
    total = jnp.where(enough, averages.total, 1.0)
    # The variance of a weighted mean is Σw(x − mean)²/(total·(steps − 1)).
    per_root = quantile / jnp.sqrt(total * (steps - 1))
    upper, lower = averages.trace, jnp.maximum(averages.grad_sq, 0)
    spreads = (
        per_root * averages.trace_spread,
        per_root * averages.shared_spread,
        per_root * averages.grad_sq_spread,
    )
    # In units of the largest, no square overflows or underflows.
    upper_unit = jnp.maximum(jnp.abs(upper), spreads[0])
    lower_unit = jnp.maximum(lower, jnp.maximum(jnp.abs(spreads[1]), spreads[2]))
    a, s = ratio(upper, upper_unit), ratio(spreads[0], upper_unit)
    b, c, d = (ratio(x, lower_unit) for x in (lower, spreads[1], spreads[2]))

    # (a − r·b)² ≤ t²·Var(a − r·b) is q₂r² − 2q₁r + q₀ ≤ 0.
    q0, q1, q2 = (a - s) * (a + s), a * b - s * c, b * b - c * c - d * d
    # √(q₁² − q₀q₂), written without the cancellation of a narrow interval.
    root = jnp.sqrt(jnp.maximum(jnp.square(a * c - s * b) + d * d * q0, 0))
    bounded = enough & (q2 > 0)
    low = jnp.where((q0 > 0) & (q1 + root > 0), ratio(q0, q1 + root), 0.0)
    high = ratio(jnp.maximum(q1 + root, 0), q2)
    unit = ratio(upper_unit, lower_unit)
    return Interval(
        ratio=jnp.where(bounded, ratio(averages.trace, averages.grad_sq), 0.0),
        low=jnp.where(enough & (lower_unit > 0), low * unit, 0.0),
        high=jnp.where(bounded, high * unit, jnp.inf),
        valid=bounded,
        # Of the same quadratic, so that it passes through 0 without a jump.
        signal_low=jnp.where(
            (q1 + root > 0) & (unit > 0), ratio(q2, (q1 + root) * unit), -_LARGEST
        ),
    )
