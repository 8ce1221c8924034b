"""Arithmetic without overflow or underflow, in which dtype, and stochastic rounding.

*Which dtype*: an array is computed with in its own dtype, but in float32 at least
(:func:`wide_dtype`). Numbers that describe a whole tree, such as norms, have the widest
of the real dtypes of its leaves (:func:`real_dtype`): float64 if one leaf is float64 or
complex128, else float32. The size of a complex number is its modulus.

*Problem*: the square of 1e20 overflows float32 and the square of 1e-23 underflows to 0.
And at β₂ = 0.999 the root of the second moment changes by 0.05 % per step, less than
half a bfloat16 spacing: rounded to nearest, it would never decay.

*Cost*: element-wise; none if the dtype is as wide as the arithmetic. What is done to
every leaf is a ``jax.jit``: one trace, and one function in the program, for all leaves
of a shape.

*Source*: stochastic rounding, Gupta et al., "Deep Learning with Limited Numerical
Precision", 2015, arXiv:1502.02551, §3. Deviation: the random bits are a hash of the
value and the step, so no key is needed and a step can be repeated exactly.
"""

import functools
from collections.abc import Callable
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


@functools.cache
def promote(first, second) -> Any:
    """The dtype that holds both dtypes, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


def wide_dtype(x) -> Any:
    """The dtype to compute with x in: its own, but at least float32."""
    return promote(jnp.result_type(x), FLOAT32)


def widen(x):
    """Casts x to the dtype to compute with it in."""
    return x.astype(wide_dtype(x))


def cast_like(tree: Any, like: Any) -> Any:
    """Casts a tree to the dtypes of another one, of NumPy arrays as JAX reads them."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def real_dtype(tree: Any) -> Any:
    """The widest dtype of the sizes of the entries of a tree, at least float32."""
    dtype = FLOAT32
    for leaf in jax.tree.leaves(tree):
        dtype = promote(dtype, jnp.finfo(wide_dtype(leaf)).dtype)
    return dtype


def tiny(dtype) -> float:
    """The smallest normal number of a dtype."""
    return float(jnp.finfo(dtype).tiny)


def huge(dtype) -> float:
    """The largest finite number of a dtype."""
    return float(jnp.finfo(dtype).max)


def capped(x):
    """x, at most the largest finite number of its dtype."""
    return jnp.minimum(x, huge(x.dtype))


def is_complex(x) -> bool:
    """Whether an array is complex."""
    return jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)


def by_component(function: Callable, x):
    """``function`` of x; of a complex x, of its real and of its imaginary part."""
    if not is_complex(x):
        return function(x)
    return lax.complex(function(x.real), function(x.imag))


def cast(x, dtype):
    """Casts a real x, or the parts of a complex x, to a real dtype."""
    return by_component(lambda part: part.astype(dtype), x)


def times(x, factor):
    """Multiplies x by a real factor, in the dtype of the factor; complex if x is."""
    return by_component(lambda part: part.astype(factor.dtype) * factor, x)


def abs_sq(x):
    """|x|², real."""
    if is_complex(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def inner_product(x, y):
    """The entries of ⟨x, y⟩, element by element; of complex ones Re(x̄·y)."""
    if is_complex(x):
        return x.real * y.real + x.imag * y.imag
    return x * y


def is_finite(x) -> jax.Array:
    """Whether |x| is finite, with a single comparison; x is float32 or wider."""
    return jnp.abs(x) <= huge(x.dtype)


def size(x):
    """The modulus of a complex x; a real x as it is, with its sign."""
    return jnp.abs(x) if is_complex(x) else x


def clip_modulus(x, limit):
    """Limits the modulus of a complex x; the phase is kept."""
    above = jnp.abs(x) > limit
    return times(x, jnp.where(above, limit / jnp.where(above, jnp.abs(x), 1), 1))


def increment(count, by: int | jax.Array = 1) -> jax.Array:
    """Returns ``count + by``, at most the largest int32; ``by`` ≥ 0."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - by) + by


@jax.jit
def scale(leaf, factor):
    """Multiplies a leaf by a real factor; the result has the dtype of the leaf.

    It computes in the wider of both dtypes; a plain number has none.
    """
    wide = real_dtype(leaf if jax.typeof(factor).weak_type else (leaf, factor))
    return times(leaf, factor.astype(wide)).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnames=("factor", "dtype"))
def square_at(factor: float, x, dtype=FLOAT32):
    """|factor·x|² in a real dtype, scaled before it is squared.

    XLA may compile this to factor²·x², which over- or underflows. A barrier hides the
    constant, but on CPU a hidden constant is written to a buffer of the shape of x; XLA
    for CPUs squares the constants of scalars only.
    """
    hidden = lax.optimization_barrier
    scale = by_platform(
        jnp.asarray(factor, dtype),
        cpu=hidden if x.size == 1 else lambda scale: scale,
        accelerator=hidden,
    )
    return abs_sq(times(x, scale))


def ratio(part, whole):
    """Returns ``part / whole``; 0 where ``whole`` is not positive."""
    positive = whole > 0
    return jnp.where(positive, part / jnp.where(positive, whole, 1.0), 0.0)


def relative_to(values, largest):
    """Returns ``values / largest`` over the full range; ``values`` if it is 0.

    XLA compiles a division by a scalar to a product with its reciprocal. The reciprocal
    of a float32 above 8e37 would be flushed to 0.
    """
    shift = jnp.where(largest > 1, 2.0**-20, 2.0**20)
    return values * shift / jnp.where(largest > 0, largest * shift, shift)


def _inverse(x):
    """1/x, and 0 where x ≥ 0 is 0 or below the normal numbers; differentiable."""
    normal = x >= tiny(x.dtype)
    return jnp.where(normal, 1 / jnp.where(normal, x, 1.0), 0.0)


@jax.custom_jvp
def root(x):
    """√x for x ≥ 0, with derivative 0 at 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals, tangents):
    result = root(*primals)
    return result, tangents[0] * 0.5 * _inverse(result)


@jax.jit
def hypot(a, b):
    """√(a² + b²) for a, b ≥ 0 of float32 or wider, without forming either square.

    The derivative at (0, 0) is 0.
    """
    return _hypot(a, b)


@jax.custom_jvp
def _hypot(a, b):
    high, low = jnp.maximum(a, b), jnp.minimum(a, b)
    ratio = low / jnp.maximum(high, tiny(high.dtype))
    return high * jnp.sqrt(1 + ratio * ratio)


@_hypot.defjvp
def _hypot_jvp(primals, tangents):
    result = _hypot(*primals)
    inverse = _inverse(result)
    (a, b), (da, db) = primals, tangents
    return result, a * inverse * da + b * inverse * db


@jax.custom_jvp
def quotient(x, y):
    """x/y for y ≥ 0; x over the least normal number, with derivative 0, below it."""
    return x / jnp.maximum(y, tiny(y.dtype))


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
      x: float32 or float64, not negative.
      step: int32[] – the rounding of the same value varies between steps.
      dtype: a float dtype; if it is as wide as float32, this is a plain cast.
    """
    if x.dtype != FLOAT32 and _narrower(dtype, x.dtype):
        x = jnp.where(x > 0, jnp.clip(x, TINY, HUGE), 0.0).astype(jnp.float32)
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
    if _narrower(dtype, x.dtype):
        largest = huge(dtype)
        x = by_component(lambda part: jnp.clip(part, -largest, largest), x)
    return x.astype(dtype)
