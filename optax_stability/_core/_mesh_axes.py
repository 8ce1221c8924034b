"""Over which devices a number is added up, under ``shard_map``.

*Problem*: there a device sees its shard of each leaf, so that a sum over the leaf goes
on over the mesh axes that shard it. Along all other axes every device holds the same:
added up over those, a leaf would count once per device.

*How*: JAX's types say along which axes an array differs between devices. They do not
with ``check_vma=False``, nor along an axis of ``vmap``: there every leaf counts as
sharded.

*Cost*: one ``psum`` of all numbers together, over all axes; what another device counts
is 0 here. No rounding.
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
    """The mesh axes along which devices differ, by a ``jax.typeof`` or a shape."""
    # JAX 0.10 gave it another name.
    newer = getattr(kind, "manual_axis_type", None)
    varying = getattr(kind, "vma", None) if newer is None else newer.varying
    return frozenset(varying or ())


def all_varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes along which any of the arrays differs."""
    kinds = [varying_axes(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*kinds)


def sharding_axes(tree: Any, whole: Any) -> AxisName:
    """The mesh axes along which the arrays differ, but not what is made of all of them.

    Such as the gradients of a loss that devices share: those are shards.
    """
    axes = all_varying_axes(tree) - varying_axes(jax.typeof(whole))
    return tuple(sorted(axes)) or None


def _types_tell(name: str) -> bool:
    """Whether what differs along an axis has another type than what does not."""
    return name in varying_axes(jax.typeof(lax.axis_index(name)))


def _counts_here(leaf, axis_name: AxisName):
    """Whether this device counts a leaf, bool[]; or True, if every device does."""
    varying = varying_axes(jax.typeof(leaf))
    copies = [name for name in _names(axis_name) if name not in varying]
    copies = tuple(filter(_types_tell, copies))
    return lax.axis_index(copies) == 0 if copies else True


def count_once(sums: list, leaves: list, axis_name: AxisName) -> list:
    """The sums over the leaves, but for 0 where another device counts the leaf."""
    here = [_counts_here(leaf, axis_name) for leaf in leaves]
    return [
        x if counts is True else jnp.where(counts, x, 0)
        for x, counts in zip(sums, here, strict=True)
    ]


def add_up(values, leaves: list, axis_name: AxisName, parts: list[int] | None = None):
    """Sums over shards of leaves, as sums over the leaves.

    Args:
      values: [n_parts, …], one row for each leaf or for each layer of it.
      leaves: the leaves.
      axis_name: mesh axes to sum over; None: the leaves are whole.
      parts: how many rows each leaf has; None: one.
    """
    if axis_name is None:
        return values
    here = [_counts_here(leaf, axis_name) for leaf in leaves]
    if not all(counts is True for counts in here):
        rows = np.repeat(
            np.arange(len(leaves)), [1] * len(leaves) if parts is None else parts
        )
        here = jnp.stack([jnp.asarray(counts) for counts in here])[rows]
        values = jnp.where(here.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    return psum(values, axis_name)


def _over_axes(collective, x, axis_name: AxisName):
    """A collective over the mesh axes, if any; ``x`` need not differ along all."""
    if axis_name is None:
        return x
    axes = frozenset(filter(_types_tell, _names(axis_name)))
    return collective(varying_along(x, axes), axis_name)


def psum(x, axis_name: AxisName):
    """The sum over the mesh axes."""
    return _over_axes(lax.psum, x, axis_name)


def mean(x, axis_name: AxisName):
    """The mean over the mesh axes."""
    return _over_axes(lax.pmean, x, axis_name)


def made_alike(x, axis_name: AxisName):
    """The mean over those of the mesh axes along which ``x`` differs."""
    differs = varying_axes(jax.typeof(x)).intersection(_names(axis_name))
    return mean(x, tuple(sorted(differs)) or None)


def largest(x, axis_name: AxisName):
    """The largest over the mesh axes."""
    return _over_axes(lax.pmax, x, axis_name)


def everywhere(holds, axis_name: AxisName):
    """Whether bools hold on every device along the mesh axes."""
    return _over_axes(lax.pmin, holds.astype(int), axis_name) > 0


def varying_along(x, axes: frozenset[str]):
    """The same value, typed as one that may differ along these axes as well."""
    more = tuple(sorted(axes - varying_axes(jax.typeof(x))))
    return lax.pcast(x, more, to="varying") if more else x


def typed_like(tree: Any, kinds: Any) -> Any:
    """The same values, typed to differ along the axes along which ``kinds`` do."""
    return jax.tree.map(
        lambda x, kind: varying_along(x, varying_axes(kind)), tree, kinds
    )


def typed_as_sum(x, leaves: list, axis_name: AxisName):
    """The same value, with the type of what is added up over the leaves."""
    return varying_along(x, all_varying_axes(leaves).difference(_names(axis_name)))
