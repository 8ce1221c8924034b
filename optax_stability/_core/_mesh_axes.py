"""Reductions over the mesh axes that shard a leaf, under ``shard_map``.

*Problem*: under ``shard_map`` a device sees only its shard of each leaf. A sum over the
leaf needs a ``psum`` over the mesh axes that shard the leaf. Along all other axes the
devices hold copies: a ``psum`` over those axes would count the leaf once per device.

*How*: the type of an array says along which mesh axes its values differ between
devices. With ``check_vma=False``, and along an axis of ``vmap``, the type does not say
so; every leaf then counts as sharded.

*Cost*: one ``psum`` of all numbers together, over all axes. Only one device counts a
copied leaf; the others contribute 0. No rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | tuple[str, ...] | None


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying_axes(kind: Any) -> frozenset[str]:
    """The mesh axes along which devices differ, from a ``jax.typeof`` or a shape."""
    # JAX 0.10 renamed the attribute.
    newer = getattr(kind, "manual_axis_type", None)
    varying = getattr(kind, "vma", None) if newer is None else newer.varying
    return frozenset(varying or ())


def all_varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes along which at least one of the arrays differs."""
    kinds = [varying_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*kinds)


def sharding_axes(tree: Any, reduced: Any) -> AxisName:
    """The mesh axes along which the arrays of ``tree`` differ but ``reduced`` does not.

    ``reduced`` belongs to all the arrays, as a loss to its gradients: along these axes
    the arrays are shards.
    """
    axes = all_varying_axes(tree) - varying_axes(jax.typeof(reduced))
    return tuple(sorted(axes)) or None


def _is_typed_axis(name: str) -> bool:
    """Whether the type of an array shows if its values differ along this axis."""
    return name in varying_axes(jax.typeof(lax.axis_index(name)))


def _counted_here(leaf, axis_name: AxisName):
    """Whether this device counts the leaf: bool[], or True if every device does."""
    varying = varying_axes(jax.typeof(leaf))
    copies = [name for name in _names(axis_name) if name not in varying]
    copies = tuple(filter(_is_typed_axis, copies))
    return lax.axis_index(copies) == 0 if copies else True


def sum_shards(
    values, leaves: list, axis_name: AxisName, parts: list[int] | None = None
):
    """Adds sums over the shards of each leaf up to sums over the leaf.

    Args:
      values: [n_parts, …], one row for each leaf or for each layer of it.
      leaves: the leaves.
      axis_name: mesh axes to sum over; None if the leaves are not sharded.
      parts: number of rows for each leaf; None for one row each.
    """
    if axis_name is None:
        return values
    here = [_counted_here(leaf, axis_name) for leaf in leaves]
    if not all(counts is True for counts in here):
        rows = np.repeat(
            np.arange(len(leaves)), [1] * len(leaves) if parts is None else parts
        )
        here = jnp.stack([jnp.asarray(counts) for counts in here])[rows]
        values = jnp.where(here.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    return psum(values, axis_name)


def _over_axes(collective, x, axis_name: AxisName):
    """Applies a collective over the mesh axes; ``x`` need not differ along them."""
    if axis_name is None:
        return x
    axes = frozenset(filter(_is_typed_axis, _names(axis_name)))
    return collective(varying_along(x, axes), axis_name)


def psum(x, axis_name: AxisName):
    """The sum over the mesh axes."""
    return _over_axes(lax.psum, x, axis_name)


def mean(x, axis_name: AxisName):
    """The mean over the mesh axes."""
    return _over_axes(lax.pmean, x, axis_name)


def mean_over_varying(x, axis_name: AxisName):
    """The mean over only those mesh axes along which ``x`` differs."""
    differs = varying_axes(jax.typeof(x)).intersection(_names(axis_name))
    return mean(x, tuple(sorted(differs)) or None)


def largest(x, axis_name: AxisName):
    """The maximum over the mesh axes."""
    return _over_axes(lax.pmax, x, axis_name)


def everywhere(holds, axis_name: AxisName):
    """Whether the bools are true on every device along the mesh axes."""
    return _over_axes(lax.pmin, holds.astype(int), axis_name) > 0


def varying_along(x, axes: frozenset[str]):
    """Casts ``x`` to a type whose values may differ along these axes as well."""
    added = tuple(sorted(axes - varying_axes(jax.typeof(x))))
    return lax.pcast(x, added, to="varying") if added else x


def typed_like(tree: Any, kinds: Any) -> Any:
    """Casts each array to differ also along the axes along which its kind differs."""
    return jax.tree.map(
        lambda x, kind: varying_along(x, varying_axes(kind)), tree, kinds
    )


def typed_as_sum(x, leaves: list, axis_name: AxisName):
    """Casts ``x`` to the type of a sum over the leaves and the mesh axes."""
    return varying_along(x, all_varying_axes(leaves).difference(_names(axis_name)))
