"""What the library needs to know of a parameter tree: leaf names and safe norms.

*Cost*: a norm is one pass over the leaves and one reduction per leaf; a second pass
runs only when a norm is above 4e9. No buffer the size of a parameter.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec, reshard

from optax_stability import _numerics

AxisName = str | tuple[str, ...] | None
Join = Callable[[list], jax.Array]
# For each leaf: whether its first axis holds separate layers.
Layered = tuple[bool, ...]

# Before leaves are squared they are scaled by a power of two: no mantissa changes. At
# the first scale squares of norms from 1e-20 to 4e9 fit float32, at the second those
# from there to 3e38: what flushes to zero (below 2⁻¹²⁶) is < 2⁻⁵⁸ of the sum.
_SCALE = 2.0**32
_RESCALE = 2.0**-98


class Leaf(NamedTuple):
    """Stands where a leaf stood: keeps a tree's paths without its arrays."""


def _is_leaf_mark(node: Any) -> bool:
    return isinstance(node, Leaf)


def is_variable(node: Any) -> bool:
    """Whether ``node`` is a Flax NNX variable; never imports Flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def pure(tree: Any) -> Any:
    """Replaces each NNX variable by its value; other trees come back as they are."""
    return jax.tree.map(
        lambda node: node.get_value() if is_variable(node) else node,
        tree,
        is_leaf=is_variable,
    )


def mark_leaves(tree: Any) -> Any:
    """The tree with a :class:`Leaf` for every leaf: paths that cost no memory."""
    return jax.tree.map(lambda _: Leaf(), pure(tree))


def number_leaves(marks: Any) -> Any:
    """The tree that :func:`mark_leaves` has marked, with 0, 1, 2 … for its leaves."""
    count = itertools.count()
    return jax.tree.map(
        lambda node: next(count) if _is_leaf_mark(node) else node,
        marks,
        is_leaf=_is_leaf_mark,
    )


def leaf_names(params: Any) -> list[str]:
    """Names the leaves of a tree, in ``jax.tree.leaves`` order.

    Entry ``i`` names entry ``i`` of every ``…/per_leaf`` metric.

    **Guarantees**

    * One name per leaf, all different.
    * The same for an NNX state, its pure counterpart and ``ShapeDtypeStruct`` leaves.

    **Edge cases**: a tree that is one bare array has the name ``"params"``. If joining
    the keys with ``/`` would give two leaves one name (a key that contains ``/``), all
    names are written as subscripts, ``['a/b']``.

    Args:
      params: any pytree: parameters, gradients, an NNX state or module.

    Returns:
      Names such as ``"blocks/3/attn/kernel"``.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf_names({"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}})
      ['dense/bias', 'dense/kernel']
    """
    return names_of_marks(mark_leaves(params))


def names_of_marks(marks: Any) -> list[str]:
    """The names of the leaves that :func:`mark_leaves` has marked."""
    marked = jax.tree_util.tree_flatten_with_path(marks, is_leaf=_is_leaf_mark)[0]
    paths = [path for path, node in marked if _is_leaf_mark(node)]
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        for path in paths
    ]
    if len(set(names)) < len(names):
        return [jax.tree_util.keystr(path) for path in paths]
    return names


def sum_over_axes(values, axis_name: AxisName):
    """The values, added up over the mesh axes of ``shard_map``."""
    return values if axis_name is None else lax.psum(values, axis_name)


def everywhere(holds, axis_name: AxisName):
    """Whether a bool[] holds on every device along the mesh axes."""
    return holds if axis_name is None else lax.pmin(holds.astype(int), axis_name) > 0


def _sum(leaf, layered: bool):
    """Sum over a leaf, or over each of the layers along its first axis."""
    return jnp.sum(leaf, axis=tuple(range(1, leaf.ndim)) if layered else None)


def _replicated(part):
    """The norms of layers that an Explicit mesh shards, gathered: a few scalars."""
    if all(axis is None for axis in jax.typeof(part).sharding.spec):
        return part
    return reshard(part, PartitionSpec(None))


def _concatenate(parts) -> jax.Array:
    return jnp.concatenate([_replicated(jnp.atleast_1d(part)) for part in parts])


def _sums_of_squares(leaves, scales, join: Join, layered: Layered, axis_name: AxisName):
    """Σ(scale·x)² of each part, joined into a vector or a total."""
    sums = [
        _sum(jnp.square(x.astype(jnp.float32) * scale), split)
        for x, scale, split in zip(leaves, scales, layered, strict=True)
    ]
    return sum_over_axes(join(sums), axis_name)


def _measure_norms(leaves, join: Join, layered: Layered, axis_name: AxisName):
    """Measures at one scale and, if a square overflowed, once more at the other."""

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
    # full_like gives the carry the type of the leaves under shard_map.
    start = [
        lax.full_like(x, jnp.inf, jnp.float32, shape=x.shape[: int(split)])
        for x, split in zip(leaves, layered, strict=True)
    ]
    norms = sum_over_axes(join(start), axis_name)
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
    return norms, sum_over_axes(join(dots), axis_name)


def count_parts(leaves, layered: Layered) -> list[int]:
    """How many norms each leaf has: one, or one per layer."""
    return [
        leaf.shape[0] if split else 1
        for leaf, split in zip(leaves, layered, strict=True)
    ]


def by_parts(values, leaves, layered: Layered) -> list[jax.Array]:
    """Hands out one value per part, in shapes that broadcast against the leaves."""
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
    return _norms(leaves, _concatenate, layered, axis_name)


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """L2 norm of the whole tree, float32[], with the guarantees of :func:`leaf_norms`.

    An empty tree has norm 0.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    known = _known_norm.get()
    if known is not None and known.is_of(leaves, axis_name):
        return known.norm
    return _norms(leaves, sum, (False,) * len(leaves), axis_name)


class _KnownNorm(NamedTuple):
    """A norm that was measured already, and of what."""

    leaves: list
    axis_name: AxisName
    norm: jax.Array

    def is_of(self, leaves: list, axis_name: AxisName) -> bool:
        """Whether it is the norm of these very arrays, not of equal ones."""
        return (
            axis_name == self.axis_name
            and len(leaves) == len(self.leaves)
            and all(a is b for a, b in zip(leaves, self.leaves, strict=True))
        )


_known_norm: ContextVar[_KnownNorm | None] = ContextVar("known_norm", default=None)


@contextmanager
def known_norm(tree: Any, norm: jax.Array, axis_name: AxisName) -> Iterator[None]:
    """While this tree is traced, :func:`global_norm` does not measure it again.

    XLA does not see that a norm inside a loop is the one measured before it, and would
    read the gradient twice. Arrays are told by identity: what was changed on the way is
    measured.
    """
    token = _known_norm.set(_KnownNorm(jax.tree.leaves(tree), axis_name, norm))
    try:
        yield
    finally:
        _known_norm.reset(token)


def leaf_sizes(tree: Any, axis_name: AxisName = None):
    """The number of entries of each leaf, over all shards, float32[n_leaves]."""
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(tree)], np.float32)
    return sum_over_axes(sizes, axis_name)


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
