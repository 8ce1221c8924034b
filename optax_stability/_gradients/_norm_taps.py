"""Layers whose backward pass also tells the norm of every example's gradient.

*Problem*: the norms of the gradients of single examples say how noisy a batch is, and
to compute these gradients one by one takes B times the memory, or B times the steps.

*How*: a tap is a zero that goes into a layer beside its parameter. The layer ignores
it; its cotangent is defined to be the squared norm of each example's part of the
gradient of that parameter, from the same input and output gradient that the plain
backward pass has in hand.

*Where*: called by the modules of :mod:`optax_stability.flax`.

*Cost*: see each function. No gradient is computed twice.

*Source*: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv
1510.01799; Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", 2021, arXiv 2110.05679 (the Gram matrices and the embedding); Gray et al.,
"Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise
Scale in Transformers", 2024, arXiv 2411.00999 (the norms from the weight gradients
themselves, and the normalisation layers).

Axis 0 of every array is the example; examples must not see each other between here and
the loss. Sums are formed in float32 at least. The squares of a NaN example are NaN, and
nobody else's are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# To write and read one entry of a weight gradient takes about as long as so many
# operations of a matrix product, on CPUs; on accelerators it takes longer.
_FLOPS_PER_ENTRY = 64


def _wide(*arrays) -> Any:
    return jnp.result_type(*arrays, jnp.float32)


def _by_example(x):
    """The array as [B, T, features]: all between the first and last axis is time."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _each_square(parts):
    """Sum of squares of every entry along axis 0, [B]."""
    return jnp.sum(jnp.square(parts), axis=tuple(range(1, parts.ndim)))


def prefers_gram(length: int, fan_in: int, fan_out: int) -> bool:
    """Whether the norms of a dense layer are cheaper from Gram matrices.

    These take 2T²(I + O) operations per example beyond the plain backward pass, and are
    all there is to do if T = 1. The other route takes none, but every example's I × O
    weight gradient goes through memory.
    """
    operations = 2 * length**2 * (fan_in + fan_out)
    return operations <= _FLOPS_PER_ENTRY * fan_in * fan_out


def gram_route(x, g, precision=None):
    """Weight gradient [I, O] and squares [B] of x[B, T, I] and g[B, T, O].

    ‖Σₜ xₜgₜᵀ‖² = Σₜₛ (xₜ·xₛ)(gₜ·gₛ), without the weight gradient of any example.
    """
    product = partial(
        jnp.einsum, precision=precision, preferred_element_type=_wide(x, g)
    )
    inputs, outputs = product("bti,bsi->bts", x, x), product("bto,bso->bts", g, g)
    # A sum of products of both signs: rounding can take it below 0.
    squares = jnp.maximum(jnp.sum(inputs * outputs, axis=(1, 2)), 0)
    return product("bti,bto->io", x, g), squares


def _all_at_once(x, g, precision):
    each = jnp.einsum(
        "bti,bto->bio",
        x,
        g,
        precision=precision,
        preferred_element_type=_wide(x, g),
    )
    return jnp.sum(each, axis=0), _each_square(each)


def _one_by_one(x, g, precision):
    def add(total, example):
        part = jnp.einsum(
            "ti,to->io",
            *example,
            precision=precision,
            preferred_element_type=total.dtype,
        )
        return total + part, jnp.sum(jnp.square(part))

    total = jnp.zeros((x.shape[-1], g.shape[-1]), _wide(x, g))
    return lax.scan(add, total, (x, g))


def weights_route(x, g, precision=None):
    """Weight gradient [I, O] and squares [B] of x[B, T, I] and g[B, T, O].

    The weight gradient of each example is formed, squared and added to the others: not
    one operation of a matrix product more than without norms.
    """
    # XLA for CPUs writes a batched product as a plain loop, much slower than the
    # products one by one. Elsewhere it is the fast one, and a loop over examples
    # would fetch them from the devices that hold them.
    return lax.platform_dependent(
        x,
        g,
        cpu=partial(_one_by_one, precision=precision),
        default=partial(_all_at_once, precision=precision),
    )


def multiply(x, kernel, precision: Any, dtype: Any):
    """``x @ kernel``, as ``nnx.Linear`` calls it."""
    dimensions = ((x.ndim - 1,), (0,)), ((), ())
    return lax.dot_general(
        x, kernel, dimensions, precision=precision, preferred_element_type=dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(x, kernel, tap, precision: Any = None, dtype: Any = None):
    """``x @ kernel``; the cotangent of the tap is ‖∂L_b/∂kernel‖² of each example.

    Costs either two Gram matrices [B, T, T], or that the weight gradient of one example
    after the other (on CPUs) or of all (elsewhere: [B, I, O]) passes through memory.

    Args:
      x: float[B, ..., I].
      kernel: float[I, O].
      tap: float32[B], zero.
      precision: of the products, as in ``jax.lax.dot_general``.
      dtype: of the result, that of the arguments by default.
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


def _finish(each, parameter, tap):
    """Gradient and squares from the gradients of all examples."""
    gradient = jnp.sum(each, axis=0).astype(parameter.dtype)
    return gradient, _each_square(each).astype(tap.dtype)


@jax.custom_vjp
def shift(x, bias, tap):
    """``x + bias``; the cotangent of the tap is ‖∂L_b/∂bias‖² of each example.

    Costs nothing to speak of: the sum that is the gradient is formed in two steps.

    Args:
      x: float[B, ..., D].
      bias: float[D], of the dtype of ``x``.
      tap: float32[B], zero.
    """
    del tap
    return x + bias


def _shift_forward(x, bias, tap):
    return shift(x, bias, tap), (bias, tap)


def _shift_backward(residuals, g):
    each = jnp.sum(_by_example(g), axis=1, dtype=_wide(g))
    return g, *_finish(each, *residuals)


shift.defvjp(_shift_forward, _shift_backward)


@jax.custom_vjp
def scale(x, factors, tap):
    """``x * factors``; the cotangent of the tap is ‖∂L_b/∂factors‖² of each example.

    Costs nothing to speak of: the sum that is the gradient is formed in two steps.

    Args:
      x: float[B, ..., D], say normalised.
      factors: float[D].
      tap: float32[B], zero.
    """
    del tap
    return x * factors


def _scale_forward(x, factors, tap):
    return scale(x, factors, tap), (x, factors, tap)


def _scale_backward(residuals, g):
    x, factors, tap = residuals
    wide = _wide(x, g)
    each = jnp.sum(_by_example(g.astype(wide) * x.astype(wide)), axis=1)
    return (g * factors).astype(x.dtype), *_finish(each, factors, tap)


scale.defvjp(_scale_forward, _scale_backward)


def _sums_by_id(ids, g):
    """For every token the sum of g over those of its example with the same id.

    By a masked product: neither a buffer per word of the vocabulary nor a scatter.
    """
    same = (ids[:, :, None] == ids[:, None, :]).astype(g.dtype)
    # Zero times NaN is NaN, within the example.
    return jnp.einsum("bts,bsd->btd", same, g)


@jax.custom_vjp
def looked_up(y, ids, tap):
    """Lets rows y = embedding[ids] pass, and taps ‖∂L_b/∂embedding‖² of each example.

    ``Σ 1[idₜ = idₛ] gₜ·gₛ`` over the positions t, s of the example: 2T²D operations.

    Args:
      y: float[B, ..., D], the rows.
      ids: int[B, ...], which rows; negative ones are not those from the end.
      tap: float32[B], zero.

    Returns:
      ``y``, and a link: zeros like it, for :func:`link` if the same embedding is the
      output head as well.
    """
    del ids, tap
    return y, jnp.zeros_like(y, dtype=_wide(y))


def _looked_up_forward(y, ids, tap):
    return looked_up(y, ids, tap), (ids, tap)


def _looked_up_backward(residuals, cotangents):
    ids, tap = residuals
    g, of_head = cotangents
    rows = _by_example(g).astype(_wide(g))
    # ‖a + h‖² = ‖a‖² + 2⟨a, h⟩ + ‖h‖², of lookup and head; the head has tapped ‖h‖².
    sums = _sums_by_id(ids.reshape(len(ids), -1), rows) + 2 * _by_example(of_head)
    squares = jnp.sum(rows * sums, axis=(1, 2))
    return g, None, squares.astype(tap.dtype)


looked_up.defvjp(_looked_up_forward, _looked_up_backward)


@jax.custom_vjp
def link(logits, hidden, ids, to_lookup):
    """Lets logits = hidden @ embeddingᵀ pass, and tells the lookup of the head's part.

    The cotangent of the link is, for every token that was looked up, the row of the
    head's gradient at its id: ``Σₛ δₛ[idₜ]·hₛ`` with δ the gradient of the logits. It
    takes 2·S·T·D operations per example.

    Args:
      logits: float[B, ..., V].
      hidden: float[B, ..., D].
      ids: int[B, ...], those of the lookup.
      to_lookup: the link that :func:`looked_up` has made.
    """
    del hidden, ids, to_lookup
    return logits


def _link_forward(logits, hidden, ids, to_lookup):
    return logits, (hidden, ids, to_lookup)


def _link_backward(residuals, g):
    hidden, ids, to_lookup = residuals
    flat = ids.reshape(len(ids), 1, -1)
    at_ids = jnp.take_along_axis(_by_example(g), flat, axis=2)
    rows = jnp.einsum(
        "bst,bsd->btd",
        at_ids,
        _by_example(hidden),
        preferred_element_type=to_lookup.dtype,
    )
    return g, jnp.zeros_like(hidden), None, rows.reshape(to_lookup.shape)


link.defvjp(_link_forward, _link_backward)


@jax.custom_vjp
def watch(parameter, seen):
    """Lets a parameter pass; the cotangent of ``seen`` is [1, ‖its gradient‖²].

    Added up over the uses: how often it was used, and whether what the taps have seen
    of its gradient is all there is.
    """
    del seen
    return parameter


def _watch_forward(parameter, seen):
    return parameter, seen


def _watch_backward(seen, g):
    square = jnp.sum(jnp.square(g.astype(_wide(g))))
    return g, jnp.stack([jnp.ones_like(square), square]).astype(seen.dtype)


watch.defvjp(_watch_forward, _watch_backward)
