"""What the library needs to know of a parameter tree: leaf names and safe norms.

*Cost*: a norm is one pass over the leaves and one reduction per leaf; a second pass
runs only when a square leaves the range of float32. No buffer the size of a parameter.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | tuple[str, ...] | None

# A float32 square is exact enough while the sum lies above _SMALL_SUM: what flushes to
# zero (below 2⁻¹²⁶) is then less than 2⁻⁶⁰ of the sum per element. Outside, the leaves
# are scaled by a power of two, which changes no mantissa.
_SMALL_SUM = 2.0**-66
_SCALE_UP = 2.0**64
_SCALE_DOWN = 2.0**-80


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


def _sum_over_axes(values, axis_name: AxisName):
    return values if axis_name is None else lax.psum(values, axis_name)


def _sums_of_squares(leaves, scales, axis_name: AxisName):
    """Σ(scale·x)² for each leaf, float32[n_leaves]."""
    sums = [
        jnp.sum(jnp.square(x.astype(jnp.float32) * scale))
        for x, scale in zip(leaves, scales, strict=True)
    ]
    return _sum_over_axes(jnp.stack(sums), axis_name)


def _rescale(sums):
    """The factor at which squares fit float32; 1 where they fit as they are."""
    up = jnp.where(jnp.sum(sums) < _SMALL_SUM, _SCALE_UP, 1.0)
    return jnp.where(jnp.any(jnp.isinf(sums)), _SCALE_DOWN, up)


def _measure_norms(leaves, axis_name: AxisName):
    """Measures at scale 1 and, if float32 could not hold the squares, once more."""

    def measure(carry):
        _, scales, norms = carry
        sums, scale = _sums_of_squares(leaves, scales, axis_name), scales[0]
        # Beside an overflow, what was finite at scale 1 stays as it was measured.
        measured_now = jnp.isinf(norms) | (scale > 1)
        norms = jnp.where(measured_now, jnp.sqrt(sums) / scale, norms)
        factor = _rescale(sums)
        again = (scale == 1) & (factor != 1)
        return again, [scale * factor for scale in scales], norms

    # One scale per leaf, though all are equal: shared by two leaves of one shape, XLA
    # would write it out as a buffer of that shape. full_like gives the carry the leaves'
    # own type under shard_map.
    scales = [lax.full_like(x, 1.0, jnp.float32, shape=()) for x in leaves]
    norms = _sum_over_axes(jnp.stack(scales), axis_name) * jnp.inf
    return lax.while_loop(
        lambda carry: carry[0], measure, (norms[0] > 0, scales, norms)
    )[2]


_leaf_norms = jax.custom_jvp(_measure_norms, nondiff_argnums=(1,))


@_leaf_norms.defjvp
def _leaf_norms_jvp(axis_name: AxisName, primals, tangents):
    """d‖x‖ = ⟨x/‖x‖, dx⟩, and 0 where x = 0."""
    (leaves,), (tangent_leaves,) = primals, tangents
    norms = _leaf_norms(leaves, axis_name)
    divisors = jnp.where(norms > 0, norms, 1.0)
    dots = [
        jnp.sum(x.astype(jnp.float32) / divisors[i] * dx.astype(jnp.float32))
        for i, (x, dx) in enumerate(zip(leaves, tangent_leaves, strict=True))
    ]
    return norms, _sum_over_axes(jnp.stack(dots), axis_name)


def leaf_norms(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """L2 norm of each leaf, float32[n_leaves], safe against overflow of the square.

    **Guarantees**: finite leaves have finite norms while the norm itself fits float32;
    multiplying the tree by 2ᵏ multiplies the norms by 2ᵏ; a leaf with a non-finite
    element has a non-finite norm and does not disturb the others; differentiable, with
    derivative 0 at a zero leaf.

    **Edge cases**: beside leaves of ordinary size, a leaf whose norm is below 1e-19 may
    read 0. A tree that is that small as a whole is measured exactly, down to 1e-37.

    Args:
      tree: arrays of any float dtype.
      axis_name: mesh axes to sum over under ``shard_map``.
    """
    leaves = jax.tree.leaves(tree)
    return _leaf_norms(leaves, axis_name) if leaves else jnp.zeros((0,), jnp.float32)


def group_norms(norms, groups, num_groups: int) -> jax.Array:
    """Joins leaf norms into one norm per group, float32[num_groups].

    Args:
      norms: float32[n_leaves], as :func:`leaf_norms` gives them.
      groups: int[n_leaves] – the group of each leaf, from 0 to ``num_groups`` − 1.
      num_groups: how many groups there are; an empty one has norm 0.
    """
    groups = np.asarray(groups, np.int32)
    largest = jnp.zeros((num_groups,), jnp.float32).at[groups].max(norms)
    # Relative to the largest of its group no square can overflow, and the sum is at
    # least 1, or 0 in a group of zeros.
    ratios = norms / jnp.where(largest > 0, largest, 1.0)[groups]
    squares = jnp.zeros((num_groups,), jnp.float32).at[groups].add(jnp.square(ratios))
    joined = largest * jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return jnp.where(jnp.isfinite(largest), joined, largest)


def global_norm(norms) -> jax.Array:
    """Joins the norms of all leaves into the norm of the tree, float32[]."""
    return group_norms(norms, np.zeros(norms.shape, np.int32), 1)[0]
