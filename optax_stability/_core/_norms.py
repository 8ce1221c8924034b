"""Norms that neither overflow nor vanish, of leaves, of their layers, of the whole.

*Cost*: a norm is one pass over the leaves and one reduction per leaf; on CPU a second
pass runs only when a norm is above 4e9, elsewhere the same pass makes two reductions.
No buffer the size of a parameter.
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
# For each leaf: whether its first axis holds separate layers.
Layered = tuple[bool, ...]

# Before leaves are squared they are scaled by a power of two: no mantissa changes. At
# the first scale squares of norms from 1e-20 to 4e9 fit float32, at the second those
# from there to 3e38: what flushes to zero (below 2⁻¹²⁶) is < 2⁻⁵⁸ of the sum.
_SCALE = 2.0**32
_RESCALE = 2.0**-98


def part_axes(leaf, layered: bool) -> tuple[int, ...]:
    """The axes to reduce: all of a leaf, or all but the first of a stacked one."""
    return tuple(range(int(layered), leaf.ndim))


def _sum(leaf, layered: bool):
    return jnp.sum(leaf, axis=part_axes(leaf, layered))


def replicated(values):
    """The values, gathered where an Explicit mesh shards them: for small arrays."""
    if all(axis is None for axis in jax.typeof(values).sharding.spec):
        return values
    return reshard(values, PartitionSpec(*[None] * values.ndim))


def concatenate(parts) -> jax.Array:
    """One vector of the numbers of all parts."""
    if not parts:
        return jnp.zeros((0,), jnp.float32)
    return jnp.concatenate([replicated(jnp.atleast_1d(part)) for part in parts])


def _joined(sums: list, leaves: list, join: Join, axis_name: AxisName):
    """Sums over shards of leaves, joined and added up over devices."""
    sums = _mesh_axes.count_once(sums, leaves, axis_name)
    return _mesh_axes.psum(join(sums), axis_name)


def _sums_of_squares(leaves, scales, join: Join, layered: Layered, axis_name: AxisName):
    """Σ(scale·x)² of each part, joined into a vector or a total."""
    sums = [
        _sum(jnp.square(x.astype(jnp.float32) * scale), split)
        for x, scale, split in zip(leaves, scales, layered, strict=True)
    ]
    return _joined(sums, leaves, join, axis_name)


def _measure_norms(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Measures at one scale and, where a square overflowed, at the other."""
    measure = _measure_twice if cond_is_cheap() else _measure_at_once
    return measure(leaves, join, layered, axis_name)


def _measure_at_once(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Both scales in one pass."""

    def at(scale):
        scales = [jnp.float32(scale)] * len(leaves)
        sums = _sums_of_squares(leaves, scales, join, layered, axis_name)
        return jnp.sqrt(sums) / scale

    norms = at(_SCALE)
    return jnp.where(jnp.isinf(norms), at(_SCALE * _RESCALE), norms)


def _measure_twice(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """The second pass only if it is needed."""

    def measure(carry):
        _, scales, norms = carry
        scale = scales[0]
        sums = _sums_of_squares(leaves, scales, join, layered, axis_name)
        # The second time, what was finite the first time stays as it was measured.
        norms = jnp.where(jnp.isinf(norms), jnp.sqrt(sums) / scale, norms)
        again = (scale == _SCALE) & jnp.any(jnp.isinf(sums))
        return again, [scale * _RESCALE for scale in scales], norms

    # One scale per leaf, though all are equal: shared by two leaves of one shape, XLA
    # would write it out as a buffer of that shape.
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
    return norms, _joined(dots, leaves, join, axis_name)


def count_parts(leaves, layered: Layered) -> list[int]:
    """How many norms each leaf has: one, or one per layer."""
    return [
        leaf.shape[0] if split else 1
        for leaf, split in zip(leaves, layered, strict=True)
    ]


def by_parts(values, leaves, layered: Layered) -> list[jax.Array]:
    """Hands out one value per part, in shapes that broadcast against the leaves."""
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
    """L2 norm of each leaf, float32[n_leaves], safe against overflow of the square.

    **Guarantees**: finite leaves have finite norms while the norm itself fits float32;
    multiplying the tree by 2ᵏ multiplies the norms by 2ᵏ; a leaf with a non-finite
    element has a non-finite norm and does not disturb the others; differentiable, with
    derivative 0 at a zero leaf.

    **Edge cases**: a norm below 1e-20 loses the entries that are below 1e-28; it may
    read 0.

    Args:
      tree: arrays of any float dtype.
      axis_name: mesh axes to sum over under ``shard_map``.
      layered: for each leaf, whether every entry along its first axis counts as a leaf
        of its own; the vector then has one entry per part.
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
      leaves: float32[n_leaves] – of each leaf.
      whole: float32[] – of all together.
    """

    leaves: jax.Array
    whole: jax.Array


def measure(tree: Any, axis_name: AxisName = None) -> Norms:
    """The norms of each leaf and of the whole, in one pass."""
    norms = leaf_norms(tree, axis_name)
    return Norms(norms, join_norms(norms))


def leaf_sizes(tree: Any, axis_name: AxisName = None):
    """The number of entries of each leaf, over all shards, float32[n_leaves]."""
    leaves = jax.tree.leaves(tree)
    sizes = np.array([leaf.size for leaf in leaves], np.float32)
    return _mesh_axes.add_up(sizes, leaves, axis_name)


def whole_leaves(norms, leaves: list, axis_name: AxisName) -> jax.Array:
    """Norms of shards of the leaves as norms of the leaves, float32[n_leaves]."""
    if axis_name is None:
        return norms
    largest = _mesh_axes.largest(norms, axis_name)
    # Relative to the largest, no square can overflow.
    squares = jnp.square(_numerics.relative_to(norms, largest))
    return largest * jnp.sqrt(_mesh_axes.add_up(squares, leaves, axis_name))


def join_norms(norms) -> jax.Array:
    """Joins the norms of parts into the norm of the whole, float32[]."""
    largest = jnp.max(norms, initial=0.0)
    # Relative to the largest, no square can overflow.
    ratios = _numerics.relative_to(norms, largest)
    joined = largest * _root(jnp.sum(jnp.square(ratios)))
    return jnp.where(jnp.isfinite(largest), joined, largest)


def join_norms_by_group(norms, groups, num_groups: int) -> jax.Array:
    """Joins the norms of parts into one norm per group, float32[num_groups].

    Args:
      norms: float32[n] – norms of the parts.
      groups: int[n] – the group of each part, from 0 to ``num_groups`` − 1.
      num_groups: how many groups there are; an empty one has norm 0.
    """
    largest = jnp.zeros((num_groups,), jnp.float32).at[groups].max(norms)
    ratios = _numerics.relative_to(norms, largest[groups])
    squares = jnp.zeros((num_groups,), jnp.float32).at[groups].add(jnp.square(ratios))
    return jnp.where(jnp.isfinite(largest), largest * _root(squares), largest)


def _root(squares):
    """√x with a finite derivative at 0, where the caller multiplies by 0."""
    return jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
