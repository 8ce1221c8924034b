"""L2 norms of a tree, its leaves and their layers, without overflow or underflow.

*Which dtype*: that of :func:`_numerics.real_dtype`: float64 if one of the leaves is
float64 or complex128, else float32. "real[]" stands for it. A complex x counts by |x|².

*Cost*: one pass over the leaves. On CPU a second pass runs only if a norm is above 4e9
(5e33 in float64); on an accelerator the single pass makes two sums. No buffer of the
size of a parameter.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_stability._core import _mesh_axes, _numerics
from optax_stability._core._leafwise import leafwise_sums, sum_layers
from optax_stability._core._mesh_axes import AxisName
from optax_stability._core._parts import Layered, by_parts, concatenate, count_parts
from optax_stability._core._platform import by_platform

# Leaves are scaled by a power of two before they are squared, so that no mantissa
# changes. At the first scale the squares of norms from 1e-20 to 4e9 fit float32, at the
# second scale those from 4e9 to 3e38. Squares below 2⁻¹²⁶ are flushed to zero: they are
# less than 2⁻⁵⁸ of the sum.
# float64 has 2⁴⁰⁰ and 2⁻⁵¹⁴ in their place, for norms from 1e-250 to 1e308.
_SCALES = {"float32": (2.0**32, 2.0**-66), "float64": (2.0**400, 2.0**-514)}


class _Scope(NamedTuple):
    """Which norms of a list of leaves are measured.

    Attributes:
      total: whether one norm of all leaves is measured, or one of each part.
      layered: for each leaf, whether every layer is a separate part.
      axis_name: mesh axes to sum over under ``shard_map``.
    """

    total: bool
    layered: Layered
    axis_name: AxisName

    def join(self, sums, leaves: list) -> jax.Array:
        """Adds the sums over parts up over the devices and, for the total, together."""
        counts = count_parts(leaves, self.layered)
        sums = _mesh_axes.sum_shards(sums, leaves, self.axis_name, counts)
        return jnp.sum(sums) if self.total else sums


def _measure_in_one_pass(leaves: list, scope: _Scope):
    """Measures at both scales in one pass."""
    dtype = _numerics.real_dtype(leaves)
    scales = _SCALES[dtype.name]

    def squares(leaf):
        return tuple(_numerics.square_at(scale, leaf, dtype) for scale in scales)

    sums = leafwise_sums(squares, leaves, outputs=2, layered=scope.layered)
    fine, coarse = (
        jnp.sqrt(scope.join(each, leaves)) / scale
        for each, scale in zip(sums, scales, strict=True)
    )
    return jnp.where(jnp.isinf(fine), coarse, fine)


@functools.partial(jax.jit, static_argnums=2)
def _sum_of_squares(leaf, scale, layered: bool) -> jax.Array:
    return sum_layers(_numerics.abs_sq(_numerics.times(leaf, scale)), layered)


def _measure_in_two_passes(leaves: list, scope: _Scope):
    """Runs the second pass, at the second scale, only if it is needed."""
    dtype = _numerics.real_dtype(leaves)
    first, second = _SCALES[dtype.name]

    def sums_at(scales):
        # One scale per leaf, although all scales are equal: if two leaves of the same
        # shape shared a scale, XLA would write the scale to a buffer of that shape.
        sums = map(_sum_of_squares, leaves, scales, scope.layered)
        return scope.join(concatenate(list(sums)), leaves)

    def measure(carry):
        _, scales, norms = carry
        scale, sums = scales[0], sums_at(scales)
        # The second pass replaces only the norms that are still infinite.
        norms = jnp.where(jnp.isinf(norms), jnp.sqrt(sums) / scale, norms)
        repeat = (scale == first) & jnp.any(jnp.isinf(sums))
        return repeat, [scale * (second / first) for scale in scales], norms

    scales = [jnp.asarray(first, dtype)] * len(leaves)
    shape = () if scope.total else sum(count_parts(leaves, scope.layered))
    norms = jnp.full(shape, jnp.inf, dtype)
    norms = _mesh_axes.typed_as_sum(norms, leaves, scope.axis_name)
    carry = jnp.any(norms > 0), scales, norms
    return lax.while_loop(lambda carry: carry[0], measure, carry)[2]


def _measure_norms(leaves: list, scope: _Scope):
    """Measures at the first scale and, after an overflow, at the second scale."""
    return by_platform(
        leaves,
        cpu=lambda leaves: _measure_in_two_passes(leaves, scope),
        accelerator=lambda leaves: _measure_in_one_pass(leaves, scope),
    )


_differentiable_norms = jax.custom_jvp(_measure_norms, nondiff_argnums=(1,))
# One trace for the gradient, the parameters and the updates.
_norms = jax.jit(_differentiable_norms, static_argnums=1)


@_differentiable_norms.defjvp
def _norms_jvp(scope: _Scope, primals, tangents):
    """d‖x‖ = ⟨x/‖x‖, dx⟩, and 0 where x = 0."""
    (leaves,), (tangent_leaves,) = primals, tangents
    norms, dtype = _norms(leaves, scope), _numerics.real_dtype(leaves)
    divisors = jnp.where(norms > 0, norms, 1.0)
    by_leaf = [divisors] * len(leaves)
    if not scope.total:
        by_leaf = by_parts(divisors, leaves, scope.layered)
    dots = [
        jnp.sum(
            _numerics.inner_product(
                _numerics.by_component(
                    lambda part, divisor=divisor: part.astype(dtype) / divisor, x
                ),
                _numerics.cast(dx, dtype),
            ),
            axis=tuple(range(int(split), x.ndim)),
        )
        for x, dx, divisor, split in zip(
            leaves, tangent_leaves, by_leaf, scope.layered, strict=True
        )
    ]
    return norms, scope.join(concatenate(dots), leaves)


def leaf_norms(
    tree: Any, axis_name: AxisName = None, layered: Layered | None = None
) -> jax.Array:
    """L2 norm of each leaf, real[n_leaves]; the squares cannot overflow.

    **Guarantees**: a finite leaf has a finite norm if the norm itself fits its dtype;
    multiplying the tree by 2ᵏ multiplies the norms by 2ᵏ; a leaf with a non-finite
    element has a non-finite norm and does not change the other norms; differentiable,
    with derivative 0 at a zero leaf.

    **Edge cases**: a norm below 1e-20 ignores entries below 1e-28; it may be 0. In
    float64 these are 1e-250 and 1e-274.

    Args:
      tree: arrays of any float or complex dtype.
      axis_name: mesh axes to sum over under ``shard_map``.
      layered: for each leaf, whether every entry along its first axis is a separate
        part; the vector then has one entry per part.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    layered = (False,) * len(leaves) if layered is None else layered
    return _norms(leaves, _Scope(False, layered, axis_name))


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """L2 norm of the whole tree, real[], with the guarantees of :func:`leaf_norms`.

    An empty tree has norm 0.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return _norms(leaves, _Scope(True, (False,) * len(leaves), axis_name))


class Norms(NamedTuple):
    """The L2 norms of a tree.

    Attributes:
      leaves: real[n_leaves] – the norm of each leaf.
      total: real[] – the norm of the whole tree.
    """

    leaves: jax.Array
    total: jax.Array


def measure(tree: Any, axis_name: AxisName = None) -> Norms:
    """The norms of each leaf and of the whole tree, in one pass."""
    norms = leaf_norms(tree, axis_name)
    return Norms(norms, join_norms(norms))


def leaf_sizes(tree: Any, axis_name: AxisName = None):
    """The number of entries of each leaf, over all shards, float32[n_leaves]."""
    leaves = jax.tree.leaves(tree)
    sizes = np.array([leaf.size for leaf in leaves], np.float32)
    return _mesh_axes.sum_shards(sizes, leaves, axis_name)


def join_shard_norms(norms, leaves: list, axis_name: AxisName) -> jax.Array:
    """Joins the norms of the shards of each leaf into its norm, real[n_leaves]."""
    if axis_name is None:
        return norms
    largest = _mesh_axes.largest(norms, axis_name)
    # Squares of ratios to the largest norm cannot overflow.
    squares = jnp.square(_numerics.relative_to(norms, largest))
    return largest * jnp.sqrt(_mesh_axes.sum_shards(squares, leaves, axis_name))


@jax.jit
def join_norms(norms) -> jax.Array:
    """Joins the norms of all parts into one norm, real[]."""
    largest = jnp.max(norms, initial=0.0)
    # Squares of ratios to the largest norm cannot overflow.
    # ∞/∞ would be NaN.
    finite = jnp.where(jnp.isfinite(largest), largest, 0.0)
    ratios = _numerics.relative_to(norms, finite)
    joined = largest * _root(jnp.sum(jnp.square(ratios)))
    return jnp.where(jnp.isfinite(largest), joined, largest)


def join_norms_by_group(norms, groups, num_groups: int) -> jax.Array:
    """Joins the norms of parts into one norm per group, real[num_groups].

    Args:
      norms: real[n] – norms of the parts.
      groups: int[n] – the group of each part, from 0 to ``num_groups`` − 1.
      num_groups: number of groups; an empty group has norm 0.
    """
    largest = jnp.zeros((num_groups,), norms.dtype).at[groups].max(norms)
    finite = jnp.isfinite(largest)
    # A limit may be ∞, and ∞/∞ is NaN.
    ratios = _numerics.relative_to(norms, jnp.where(finite, largest, 0.0)[groups])
    squares = jnp.zeros((num_groups,), norms.dtype).at[groups].add(jnp.square(ratios))
    return jnp.where(finite, largest * _root(squares), largest)


def _root(squares):
    """√x, but 1 at 0 for a finite derivative; there the caller multiplies by 0."""
    return jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
