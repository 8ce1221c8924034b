"""L2 norms of a tree, its leaves and their layers, without overflow or underflow.

*Cost*: one pass over the leaves and one reduction per leaf. On CPU a second pass runs
only if a norm is above 4e9; on other backends the single pass makes two reductions per
leaf. No buffer of the size of a parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec, reshard

from optax_stability._core import _mesh_axes, _numerics
from optax_stability._core._in_place import cond_is_cheap
from optax_stability._core._mesh_axes import AxisName

Join = Callable[[list], jax.Array]
# For each leaf, whether its first axis is a layer axis.
Layered = tuple[bool, ...]

# Leaves are scaled by a power of two before they are squared, so that no mantissa
# changes. At the first scale the squares of norms from 1e-20 to 4e9 fit float32, at the
# second scale those from 4e9 to 3e38. Squares below 2⁻¹²⁶ are flushed to zero: they are
# less than 2⁻⁵⁸ of the sum.
_SCALE = 2.0**32
_RESCALE = 2.0**-98


def part_axes(leaf, layered: bool) -> tuple[int, ...]:
    """The axes to reduce: all of a leaf, or all but the first of a stacked one."""
    return tuple(range(int(layered), leaf.ndim))


def _sum(leaf, layered: bool):
    return jnp.sum(leaf, axis=part_axes(leaf, layered))


def replicated(values):
    """Gathers values that an Explicit mesh shards; use it only for small arrays."""
    if all(axis is None for axis in jax.typeof(values).sharding.spec):
        return values
    return reshard(values, PartitionSpec(*[None] * values.ndim))


def concatenate(parts) -> jax.Array:
    """Concatenates numbers and vectors into one vector."""
    if not parts:
        return jnp.zeros((0,), jnp.float32)
    return jnp.concatenate([replicated(jnp.atleast_1d(part)) for part in parts])


def _reduce(sums: list, leaves: list, join: Join, axis_name: AxisName):
    """Joins the sums over the shards of leaves, and adds them up over the devices."""
    sums = _mesh_axes.count_once(sums, leaves, axis_name)
    return _mesh_axes.psum(join(sums), axis_name)


def _sums_of_squares(leaves, scales, join: Join, layered: Layered, axis_name: AxisName):
    """Σ(scale·x)² of each part, joined into a vector or a total."""
    sums = [
        _sum(jnp.square(x.astype(jnp.float32) * scale), split)
        for x, scale, split in zip(leaves, scales, layered, strict=True)
    ]
    return _reduce(sums, leaves, join, axis_name)


def _measure_norms(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Measures at the first scale and, after an overflow, at the second scale."""
    measure = _measure_in_two_passes if cond_is_cheap() else _measure_in_one_pass
    return measure(leaves, join, layered, axis_name)


def _measure_in_one_pass(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Measures at both scales in one pass."""

    def norms_at(scale):
        scales = [jnp.float32(scale)] * len(leaves)
        sums = _sums_of_squares(leaves, scales, join, layered, axis_name)
        return jnp.sqrt(sums) / scale

    norms = norms_at(_SCALE)
    return jnp.where(jnp.isinf(norms), norms_at(_SCALE * _RESCALE), norms)


def _measure_in_two_passes(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Runs the second pass, at the second scale, only if it is needed."""

    def measure(carry):
        _, scales, norms = carry
        scale = scales[0]
        sums = _sums_of_squares(leaves, scales, join, layered, axis_name)
        # The second pass replaces only the norms that are still infinite.
        norms = jnp.where(jnp.isinf(norms), jnp.sqrt(sums) / scale, norms)
        repeat = (scale == _SCALE) & jnp.any(jnp.isinf(sums))
        return repeat, [scale * _RESCALE for scale in scales], norms

    # One scale per leaf, although all scales are equal: if two leaves of the same shape
    # shared a scale, XLA would write the scale to a buffer of that shape.
    scales = [jnp.float32(_SCALE)] * len(leaves)
    unknown = jnp.full(
        () if join is sum else sum(count_parts(leaves, layered)), jnp.inf
    )
    norms = _mesh_axes.typed_as_sum(unknown, leaves, axis_name)
    carry = jnp.any(norms > 0), scales, norms
    return lax.while_loop(lambda carry: carry[0], measure, carry)[2]


_norms = jax.custom_jvp(_measure_norms, nondiff_argnums=(1, 2, 3))


@_norms.defjvp
def _norms_jvp(join: Join, layered: Layered, axis_name: AxisName, primals, tangents):
    """d‖x‖ = ⟨x/‖x‖, dx⟩, and 0 where x = 0."""
    (leaves,), (tangent_leaves,) = primals, tangents
    norms = _norms(leaves, join, layered, axis_name)
    divisors = jnp.where(norms > 0, norms, 1.0)
    by_leaf = [divisors] * len(leaves)
    if divisors.ndim:
        by_leaf = by_parts(divisors, leaves, layered)
    dots = [
        _sum(x.astype(jnp.float32) / divisor * dx.astype(jnp.float32), split)
        for x, dx, divisor, split in zip(
            leaves, tangent_leaves, by_leaf, layered, strict=True
        )
    ]
    return norms, _reduce(dots, leaves, join, axis_name)


def count_parts(leaves, layered: Layered) -> list[int]:
    """The number of norms of each leaf: one, or one per layer."""
    return [
        leaf.shape[0] if split else 1
        for leaf, split in zip(leaves, layered, strict=True)
    ]


def by_parts(values, leaves, layered: Layered) -> list[jax.Array]:
    """For each leaf, the values of its parts, in a shape that broadcasts to it."""
    if not leaves:
        return []
    ends = np.cumsum(count_parts(leaves, layered))[:-1]
    return [
        part.reshape(-1, *[1] * (leaf.ndim - 1)) if split else part[0]
        for part, leaf, split in zip(
            jnp.split(values, ends), leaves, layered, strict=True
        )
    ]


def leaf_norms(
    tree: Any, axis_name: AxisName = None, layered: Layered | None = None
) -> jax.Array:
    """L2 norm of each leaf, float32[n_leaves]; the squares cannot overflow.

    **Guarantees**: a finite leaf has a finite norm if the norm itself fits float32;
    multiplying the tree by 2ᵏ multiplies the norms by 2ᵏ; a leaf with a non-finite
    element has a non-finite norm and does not change the other norms; differentiable,
    with derivative 0 at a zero leaf.

    **Edge cases**: a norm below 1e-20 ignores entries below 1e-28; it may be 0.

    Args:
      tree: arrays of any float dtype.
      axis_name: mesh axes to sum over under ``shard_map``.
      layered: for each leaf, whether every entry along its first axis is a separate
        part; the vector then has one entry per part.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    layered = (False,) * len(leaves) if layered is None else layered
    return _norms(leaves, concatenate, layered, axis_name)


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """L2 norm of the whole tree, float32[], with the guarantees of :func:`leaf_norms`.

    An empty tree has norm 0.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return _norms(leaves, sum, (False,) * len(leaves), axis_name)


class Norms(NamedTuple):
    """The L2 norms of a tree.

    Attributes:
      leaves: float32[n_leaves] – the norm of each leaf.
      total: float32[] – the norm of the whole tree.
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
    """Joins the norms of the shards of each leaf into its norm, float32[n_leaves]."""
    if axis_name is None:
        return norms
    largest = _mesh_axes.largest(norms, axis_name)
    # Squares of ratios to the largest norm cannot overflow.
    squares = jnp.square(_numerics.relative_to(norms, largest))
    return largest * jnp.sqrt(_mesh_axes.sum_shards(squares, leaves, axis_name))


def join_norms(norms) -> jax.Array:
    """Joins the norms of all parts into one norm, float32[]."""
    largest = jnp.max(norms, initial=0.0)
    # Squares of ratios to the largest norm cannot overflow.
    ratios = _numerics.relative_to(norms, largest)
    joined = largest * _root(jnp.sum(jnp.square(ratios)))
    return jnp.where(jnp.isfinite(largest), joined, largest)


def join_norms_by_group(norms, groups, num_groups: int) -> jax.Array:
    """Joins the norms of parts into one norm per group, float32[num_groups].

    Args:
      norms: float32[n] – norms of the parts.
      groups: int[n] – the group of each part, from 0 to ``num_groups`` − 1.
      num_groups: number of groups; an empty group has norm 0.
    """
    largest = jnp.zeros((num_groups,), jnp.float32).at[groups].max(norms)
    ratios = _numerics.relative_to(norms, largest[groups])
    squares = jnp.zeros((num_groups,), jnp.float32).at[groups].add(jnp.square(ratios))
    return jnp.where(jnp.isfinite(largest), largest * _root(squares), largest)


def _root(squares):
    """√x, but 1 at 0 for a finite derivative; there the caller multiplies by 0."""
    return jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
