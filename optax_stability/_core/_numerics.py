"""Arithmetic without overflow or underflow, and stochastic rounding.

*Problem*: the square of 1e20 overflows float32 and the square of 1e-23 underflows to 0.
And at β₂ = 0.999 the root of the second moment changes by 0.05 % per step, less than
half a bfloat16 spacing: rounded to nearest, it would never decay.

*Cost*: element-wise; none if the dtype is as wide as the arithmetic.

*Source*: stochastic rounding, Gupta et al., "Deep Learning with Limited Numerical
Precision", 2015, arXiv:1502.02551, §3. Deviation: the random bits are a hash of the
value and the step, so no key is needed and a step can be repeated exactly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_stability._core._platform import by_platform

TINY = float(jnp.finfo(jnp.float32).tiny)
HUGE = float(jnp.finfo(jnp.float32).max)
# Not jnp.float32, which is callable: inject_hyperparams would call it as a schedule.
FLOAT32 = jnp.dtype("float32")

_MANTISSA_BITS = 0x007FFFFF
_EXPONENT_BITS = 0x7F800000


def promote(first, second) -> Any:
    """The dtype that holds both dtypes, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def is_finite(x) -> jax.Array:
    """Whether x (float32) is finite, with a single comparison."""
    return jnp.abs(x) <= HUGE


def increment(count, by: int | jax.Array = 1) -> jax.Array:
    """Returns ``count + by``, at most the largest int32; ``by`` ≥ 0."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - by) + by


def scale(leaf, factor):
    """Multiplies a leaf by a float32 factor; the result has the dtype of the leaf."""
    wide = promote(leaf.dtype, FLOAT32)
    return (leaf.astype(wide) * jnp.asarray(factor, wide)).astype(leaf.dtype)


def square_at(factor: float, x):
    """(factor·x)² in float32, scaled before it is squared.

    XLA may compile this to factor²·x², which over- or underflows. A barrier hides the
    constant, but on CPU a hidden constant is written to a buffer of the shape of x; XLA
    for CPUs squares the constants of scalars only.
    """
    hidden = lax.optimization_barrier
    scale = by_platform(
        jnp.float32(factor),
        cpu=hidden if x.size == 1 else lambda scale: scale,
        accelerator=hidden,
    )
    return jnp.square(x.astype(jnp.float32) * scale)


def ratio(part, whole):
    """Returns ``part / whole``; 0 where ``whole`` is not positive."""
    positive = whole > 0
    return jnp.where(positive, part / jnp.where(positive, whole, 1.0), 0.0)


def relative_to(values, largest):
    """Returns ``values / largest`` over the full float32 range; ``values`` if it is 0.

    XLA compiles a division by a scalar to a product with its reciprocal. The reciprocal
    of a number above 8e37 would be flushed to 0.
    """
    shift = jnp.where(largest > 1, 2.0**-20, 2.0**20)
    return values * shift / jnp.where(largest > 0, largest * shift, shift)


def _inverse(x):
    """1/x, and 0 where x ≥ 0 is 0 or below the normal numbers; differentiable."""
    normal = x >= TINY
    return jnp.where(normal, 1 / jnp.where(normal, x, 1.0), 0.0)


@jax.custom_jvp
def root(x):
    """√x for x ≥ 0, with derivative 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals, tangents):
    result = root(*primals)
    return result, tangents[0] * 0.5 * _inverse(result)


@jax.custom_jvp
def hypot(a, b):
    """√(a² + b²) for float32 a, b ≥ 0, without forming either square.

    The derivative at (0, 0) is 0.
    """
    high, low = jnp.maximum(a, b), jnp.minimum(a, b)
    ratio = low / jnp.maximum(high, TINY)
    return high * jnp.sqrt(1 + ratio * ratio)


@hypot.defjvp
def _hypot_jvp(primals, tangents):
    result = hypot(*primals)
    inverse = _inverse(result)
    (a, b), (da, db) = primals, tangents
    return result, a * inverse * da + b * inverse * db


@jax.custom_jvp
def quotient(x, y):
    """x/y for y ≥ 0; x over the least normal number, with derivative 0, below it."""
    return x / jnp.maximum(y, TINY)


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    result, inverse = quotient(*primals), _inverse(primals[1])
    return result, inverse * tangents[0] - result * inverse * tangents[1]


@jax.custom_jvp
def angle(x, y):
    """atan2(x, y) for y ≥ 0, with derivative 0 at (0, 0)."""
    return lax.atan2(x, y)


@angle.defjvp
def _angle_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    inverse = _inverse(hypot(jnp.abs(x), y))
    return angle(x, y), inverse * (y * inverse * dx - x * inverse * dy)


def _narrower(dtype, than) -> bool:
    return jnp.finfo(dtype).nmant < jnp.finfo(than).nmant


def _uniform(bits):
    """Uniform numbers in [0, 1) from integer bits (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = (bits ^ (bits >> 16)) >> 8
    return bits.astype(jnp.float32) * 2.0**-24


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def round_stochastically(x, step, dtype):
    """Casts x ≥ 0 to ``dtype``, rounded up or down so that the mean over steps is x.

    **Guarantees**: the mean over steps is x to 1 %; a result for x > 0 is at least the
    smallest positive number of ``dtype`` and at most the largest; scaling x by a power
    of two scales the result, while both are normal numbers. The derivative is that of
    the mean, 1.

    Args:
      x: float32, not negative.
      step: int32[] – the rounding of the same value varies between steps.
      dtype: a float dtype; if it is as wide as float32, this is a plain cast.
    """
    if not _narrower(dtype, x.dtype):
        return x.astype(dtype)
    info = jnp.finfo(dtype)
    eps, smallest_normal = float(info.eps), float(info.smallest_normal)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    power = lax.bitcast_convert_type(bits & jnp.uint32(_EXPONENT_BITS), jnp.float32)
    power = jnp.maximum(power, smallest_normal)
    salt = (step.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B9)
    # Only mantissa bits are hashed, so that the choice is the same at every scale.
    chance = _uniform((bits & jnp.uint32(_MANTISSA_BITS)) + salt)
    # In units of the spacing eps·power, which itself may be subnormal.
    steps = x / power * (1 / eps)
    below = jnp.floor(steps)
    rounded = jnp.where(chance < steps - below, below + 1, below) * eps * power
    smallest = max(float(info.smallest_subnormal), TINY)
    clipped = jnp.clip(rounded, smallest, float(info.max))
    return jnp.where(x > 0, clipped, 0.0).astype(dtype)


@round_stochastically.defjvp
def _round_stochastically_jvp(dtype, primals, tangents):
    return round_stochastically(*primals, dtype), tangents[0].astype(dtype)


def saturating_cast(x, dtype):
    """Casts x; a value out of range becomes ± the largest number of ``dtype``."""
    largest = float(jnp.finfo(dtype).max)
    if _narrower(dtype, x.dtype):
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)
