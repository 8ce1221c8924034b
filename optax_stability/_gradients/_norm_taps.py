"""Layers whose backward pass also computes the norm of every example's gradient.

*Problem*: per-example gradient norms show how noisy a batch is, but computing
per-example gradients takes B times the memory, or B times the steps.

*How*: a tap is an array of zeros that a layer takes beside its parameter. The layer
ignores its value. The cotangent of the tap is defined as the squared norm of each
example's part of the gradient of that parameter. It is computed from the input and the
output gradient that the plain backward pass uses.

*Where*: called by the modules of :mod:`optax_stability.flax`.

*Cost*: see each function. No gradient is computed twice.

*Source*: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv
1510.01799; Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", 2021, arXiv 2110.05679 (the Gram matrices and the embedding); Gray et al.,
"Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise
Scale in Transformers", 2024, arXiv 2411.00999 (the norms from the weight gradients
themselves, and the normalisation layers).

Axis 0 of every array is the example; examples must not interact between here and the
loss. Sums are formed in float32 at least. An example with NaN gets squared norms of
NaN; the other examples are not affected.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_stability._core import _numerics

# On CPUs, writing and reading one entry of a weight gradient takes about as long as
# this many operations of a matrix product; on accelerators it takes longer.
_FLOPS_PER_ENTRY = 64


def _wide_dtype(*arrays) -> Any:
    dtypes = (jnp.result_type(x) for x in arrays)
    return reduce(_numerics.promote, dtypes, _numerics.FLOAT32)


def _by_example(x):
    """Reshapes to [B, T, features]; T are all axes between the first and the last."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def along_features(parameter, x):
    """Reshapes parameter[D] to [1, ..., D], with the axes of x[B, ..., D]."""
    return jnp.expand_dims(parameter, tuple(range(x.ndim - 1)))


def _squared_norms(parts):
    """Sum of squares of each example, [B]."""
    return jnp.sum(jnp.square(parts), axis=tuple(range(1, parts.ndim)))


def prefers_gram(length: int, fan_in: int, fan_out: int) -> bool:
    """Whether Gram matrices are the cheaper route to the norms of a dense layer.

    Gram matrices take 2T²(I + O) operations per example beyond the plain backward pass;
    if T = 1 no other work is needed. The other route takes no such operations, but
    writes and reads the I × O weight gradient of every example.
    """
    operations = 2 * length**2 * (fan_in + fan_out)
    return operations <= _FLOPS_PER_ENTRY * fan_in * fan_out


def gram_route(x, g, precision=None):
    """Weight gradient [I, O] and squared norms [B] of x[B, T, I] and g[B, T, O].

    ‖Σₜ xₜgₜᵀ‖² = Σₜₛ (xₜ·xₛ)(gₜ·gₛ) needs no per-example weight gradient.
    """
    product = partial(
        jnp.einsum, precision=precision, preferred_element_type=_wide_dtype(x, g)
    )
    inputs, outputs = product("bti,bsi->bts", x, x), product("bto,bso->bts", g, g)
    # The products have both signs: rounding can make their sum negative.
    squares = jnp.maximum(jnp.sum(inputs * outputs, axis=(1, 2)), 0)
    return product("bti,bto->io", x, g), squares


def _all_at_once(x, g, precision):
    per_example = jnp.einsum(
        "bti,bto->bio",
        x,
        g,
        precision=precision,
        preferred_element_type=_wide_dtype(x, g),
    )
    return jnp.sum(per_example, axis=0), _squared_norms(per_example)


def _one_by_one(x, g, precision):
    def add(total, example):
        part = jnp.einsum(
            "ti,to->io",
            *example,
            precision=precision,
            preferred_element_type=total.dtype,
        )
        return total + part, jnp.sum(jnp.square(part))

    total = jnp.zeros((x.shape[-1], g.shape[-1]), _wide_dtype(x, g))
    return lax.scan(add, total, (x, g))


def weights_route(x, g, precision=None):
    """Weight gradient [I, O] and squared norms [B] of x[B, T, I] and g[B, T, O].

    The weight gradient of each example is formed, squared and added to the total. The
    matrix products take no more operations than without norms.
    """
    # On CPUs, XLA compiles a batched product to a plain loop, which is much slower than
    # one product per example. On other backends the batched product is faster, and a
    # loop over examples would fetch each example from the device that holds it.
    return lax.platform_dependent(
        x,
        g,
        cpu=partial(_one_by_one, precision=precision),
        default=partial(_all_at_once, precision=precision),
    )


def multiply(x, kernel, precision: Any, dtype: Any):
    """``x @ kernel``, by the same call as in ``nnx.Linear``."""
    dimensions = ((x.ndim - 1,), (0,)), ((), ())
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(x, kernel, tap, precision: Any = None, dtype: Any = None):
    """``x @ kernel``; the cotangent of the tap is ‖∂L_b/∂kernel‖² of each example.

    Costs either two Gram matrices [B, T, T], or the memory traffic of the weight
    gradients: of one example at a time on CPUs, of all examples [B, I, O] elsewhere.

    Args:
      x: float[B, ..., I].
      kernel: float[I, O].
      tap: float32[B], zero.
      precision: precision of the products, as in ``jax.lax.dot_general``.
      dtype: dtype of the result; None: the dtype of the arguments.
    """
    del tap
    return multiply(x, kernel, precision, dtype)


def _dense_forward(x, kernel, tap, precision, dtype):
    return dense(x, kernel, tap, precision, dtype), (x, kernel, tap)


def _dense_backward(precision, dtype, residuals, g):
    del dtype
    x, kernel, tap = residuals
    dx = multiply(g, kernel.T, precision, x.dtype)
    x, g = _by_example(x), _by_example(g)
    is_gram = prefers_gram(x.shape[1], *kernel.shape)
    route = gram_route if is_gram else weights_route
    dkernel, squares = route(x, g, precision)
    return dx, dkernel.astype(kernel.dtype), squares.astype(tap.dtype)


dense.defvjp(_dense_forward, _dense_backward)


def _sum_and_squares(per_example, parameter, tap):
    """Gradient and squared norms [B] from the gradients of all examples."""
    gradient = jnp.sum(per_example, axis=0).astype(parameter.dtype)
    return gradient, _squared_norms(per_example).astype(tap.dtype)


@jax.custom_vjp
def shift(x, bias, tap):
    """``x + bias``; the cotangent of the tap is ‖∂L_b/∂bias‖² of each example.

    The cost is negligible: the sum for the gradient is formed in two steps.

    Args:
      x: float[B, ..., D].
      bias: float[D], with the dtype of ``x``.
      tap: float32[B], zero.
    """
    del tap
    return x + along_features(bias, x)


def _shift_forward(x, bias, tap):
    return shift(x, bias, tap), (bias, tap)


def _shift_backward(residuals, g):
    per_example = jnp.sum(_by_example(g), axis=1, dtype=_wide_dtype(g))
    return g, *_sum_and_squares(per_example, *residuals)


shift.defvjp(_shift_forward, _shift_backward)


@jax.custom_vjp
def scale(x, factors, tap):
    """``x * factors``; the cotangent of the tap is ‖∂L_b/∂factors‖² of each example.

    The cost is negligible: the sum for the gradient is formed in two steps.

    Args:
      x: float[B, ..., D], for example normalised.
      factors: float[D].
      tap: float32[B], zero.
    """
    del tap
    return x * along_features(factors, x)


def _scale_forward(x, factors, tap):
    return scale(x, factors, tap), (x, factors, tap)


def _scale_backward(residuals, g):
    x, factors, tap = residuals
    wide = _wide_dtype(x, g)
    per_example = jnp.sum(_by_example(g.astype(wide) * x.astype(wide)), axis=1)
    dx = (g * along_features(factors, g)).astype(x.dtype)
    return dx, *_sum_and_squares(per_example, factors, tap)


scale.defvjp(_scale_forward, _scale_backward)


def _sums_by_id(ids, g):
    """For every token, the sum of g over the tokens of its example with the same id.

    A matrix product with a mask needs neither a buffer of vocabulary size nor a
    scatter.
    """
    same = (ids[:, :, None] == ids[:, None, :]).astype(g.dtype)
    # 0·NaN is NaN: a NaN spreads within its example only.
    return jnp.einsum("bts,bsd->btd", same, g)


@jax.custom_vjp
def tap_lookup(y, ids, tap):
    """Returns rows y = embedding[ids], and taps ‖∂L_b/∂embedding‖² of each example.

    ``Σ 1[idₜ = idₛ] gₜ·gₛ`` over the positions t, s of the example: 2T²D operations.

    Args:
      y: float[B, ..., D], the rows.
      ids: int[B, ...], the row numbers; negative ids do not count from the end.
      tap: float32[B], zero.

    Returns:
      ``y``, and a link: zeros like ``y``, for :func:`link_to_lookup` if the output head
      uses the same embedding.
    """
    del ids, tap
    return y, jnp.zeros_like(y, dtype=_wide_dtype(y))


def _tap_lookup_forward(y, ids, tap):
    return tap_lookup(y, ids, tap), (ids, tap)


def _tap_lookup_backward(residuals, cotangents):
    ids, tap = residuals
    g, head_rows = cotangents
    rows = _by_example(g).astype(_wide_dtype(g))
    # ‖a + h‖² = ‖a‖² + 2⟨a, h⟩ + ‖h‖² for lookup a and head h; the head taps ‖h‖².
    sums = _sums_by_id(ids.reshape(len(ids), -1), rows) + 2 * _by_example(head_rows)
    squares = jnp.sum(rows * sums, axis=(1, 2))
    return g, None, squares.astype(tap.dtype)


tap_lookup.defvjp(_tap_lookup_forward, _tap_lookup_backward)


@jax.custom_vjp
def link_to_lookup(logits, hidden, ids, link):
    """Returns logits = hidden @ embeddingᵀ, and sends head gradients to the lookup.

    The cotangent of the link is, for every looked-up token, the row of the head's
    gradient at the id of the token: ``Σₛ δₛ[idₜ]·hₛ``, where δ is the gradient of the
    logits. It takes 2·S·T·D operations per example.

    Args:
      logits: float[B, ..., V].
      hidden: float[B, ..., D].
      ids: int[B, ...], the ids of the lookup.
      link: the link that :func:`tap_lookup` returned.
    """
    del hidden, ids, link
    return logits


def _link_to_lookup_forward(logits, hidden, ids, link):
    return logits, (hidden, ids, link)


def _link_to_lookup_backward(residuals, g):
    hidden, ids, link = residuals
    flat = ids.reshape(len(ids), 1, -1)
    at_ids = jnp.take_along_axis(_by_example(g), flat, axis=2)
    rows = jnp.einsum(
        "bst,bsd->btd",
        at_ids,
        _by_example(hidden),
        preferred_element_type=link.dtype,
    )
    return g, jnp.zeros_like(hidden), None, rows.reshape(link.shape)


link_to_lookup.defvjp(_link_to_lookup_forward, _link_to_lookup_backward)


@jax.custom_vjp
def tap_parameter(parameter, tap):
    """Returns the parameter; the cotangent of ``tap`` is [1, ‖parameter gradient‖²].

    Cotangents add up over the calls with the same tap. The first entry counts the uses
    of the parameter. The second shows whether the taps of the layers have seen its
    whole gradient.

    Args:
      parameter: any array.
      tap: float32[2], zero.
    """
    del tap
    return parameter


def _tap_parameter_forward(parameter, tap):
    return parameter, tap


def _tap_parameter_backward(tap, g):
    square = jnp.sum(jnp.square(g.astype(_wide_dtype(g))))
    return g, jnp.stack([jnp.ones_like(square), square]).astype(tap.dtype)


tap_parameter.defvjp(_tap_parameter_forward, _tap_parameter_backward)
