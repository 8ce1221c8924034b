"""Arithmetic that neither overflows, nor underflows, nor freezes.

*Problem*: the square of 1e20 overflows float32 and that of 1e-23 vanishes. And at
β₂ = 0.999 a second-moment root moves by 0.05 % a step, less than half a bfloat16
spacing: stored to nearest it would never decay.

*Cost*: element-wise; nothing where the dtype is as wide as the arithmetic.

*Source*: stochastic rounding, Gupta et al., "Deep Learning with Limited Numerical
Precision", 2015, arXiv:1502.02551, §3. Deviation: the random bits are a hash of the
value and the step, so no key is needed and a step can be repeated exactly.
"""

import jax
import jax.numpy as jnp
from jax import lax

TINY = float(jnp.finfo(jnp.float32).tiny)
HUGE = float(jnp.finfo(jnp.float32).max)
# Not jnp.float32, which is callable: inject_hyperparams would call it as a schedule.
FLOAT32 = jnp.dtype("float32")

_MANTISSA_BITS = 0x007FFFFF
_EXPONENT_BITS = 0x7F800000


def is_finite(x) -> jax.Array:
    """Whether float32 x is finite, as one comparison."""
    return jnp.abs(x) <= HUGE


def increment(count, by: int | jax.Array = 1) -> jax.Array:
    """Count + by, or the largest int32 once that is reached; ``by`` ≥ 0."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - by) + by


def scale(leaf, factor):
    """A leaf times a float32 factor, in the leaf's dtype."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    return (leaf.astype(wide) * factor).astype(leaf.dtype)


def ratio(part, whole):
    """Part / whole; 0 where the whole is not above 0."""
    known = whole > 0
    return jnp.where(known, part / jnp.where(known, whole, 1.0), 0.0)


def relative_to(values, largest):
    """Values / largest over the whole range of float32; values where largest is 0.

    Compiled, a division by a scalar is a product with its reciprocal, which would be
    flushed to 0 for what is above 8e37.
    """
    shift = jnp.where(largest > 1, 2.0**-20, 2.0**20)
    return values * shift / jnp.where(largest > 0, largest * shift, shift)


def hypot(a, b):
    """√(a² + b²) for float32 a, b ≥ 0, without forming either square."""
    high, low = jnp.maximum(a, b), jnp.minimum(a, b)
    ratio = low / jnp.maximum(high, TINY)
    return high * jnp.sqrt(1 + ratio * ratio)


def _narrower(dtype, than) -> bool:
    return jnp.finfo(dtype).nmant < jnp.finfo(than).nmant


def _uniform(bits):
    """Uniform numbers in [0, 1) from integer bits (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = (bits ^ (bits >> 16)) >> 8
    return bits.astype(jnp.float32) * 2.0**-24


def round_at_random(x, step, dtype):
    """Stores x ≥ 0 in ``dtype``, rounded up or down with the right mean.

    **Guarantees**: the mean over steps is x to 1 %; what is not zero stays at least the
    smallest positive number of ``dtype`` and at most its largest; scaling x by a power
    of two scales the result, while both are normal numbers.

    Args:
      x: float32, not negative.
      step: int32[] – makes the rounding of one value differ from step to step.
      dtype: a float dtype; one as wide as float32 is a plain cast.
    """
    if not _narrower(dtype, x.dtype):
        return x.astype(dtype)
    info = jnp.finfo(dtype)
    eps, smallest_normal = float(info.eps), float(info.smallest_normal)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = lax.bitcast_convert_type(bits & jnp.uint32(_EXPONENT_BITS), jnp.float32)
    power = jnp.maximum(power, smallest_normal)
    salt = (step.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B9)
    # Only mantissa bits enter: the choice is the same at every scale.
    chance = _uniform((bits & jnp.uint32(_MANTISSA_BITS)) + salt)
    # In units of the spacing eps·power, which itself may be subnormal.
    steps = x / power * (1 / eps)
    below = jnp.floor(steps)
    rounded = jnp.where(chance < steps - below, below + 1, below) * eps * power
    smallest = max(float(info.smallest_subnormal), TINY)
    kept = jnp.clip(rounded, smallest, float(info.max))
    return jnp.where(x > 0, kept, 0.0).astype(dtype)


def round_to_range(x, dtype):
    """Casts x; what ``dtype`` cannot hold becomes its largest number, never Inf."""
    largest = float(jnp.finfo(dtype).max)
    if _narrower(dtype, x.dtype):
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)
