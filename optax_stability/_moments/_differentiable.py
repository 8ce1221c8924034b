"""Parameters that hold more than parameters: functions, strings, integers, keys.

*Problem*: a module of Equinox is a tree, in which an activation function or the rate of
a dropout is a leaf as well. ``jax.grad`` refuses such trees.

*Where*: around whatever is differentiated. *Cost*: none on the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_stability._core import _tree


def _is_differentiable(leaf: Any) -> bool:
    """Whether a leaf is an array of floats or complex numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _describe(params: Any) -> str:
    """The first leaf of a tree, for a message."""
    name, leaf = _tree.leaf_names(params)[0], jax.tree.leaves(params)[0]
    kind = leaf.dtype if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
    return f"{kind} in the leaf {name!r}"


def split_static(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Separates what has a gradient from what has none.

    Args:
      params: any tree.

    Returns:
      The tree with None in place of every leaf that is not an array of floats or
      complex numbers, and a function that puts these leaves back.

    Raises:
      ValueError: no leaf is such an array; a tree without leaves is returned as it is.
    """
    leaves, treedef = jax.tree.flatten(params)
    found = [_is_differentiable(leaf) for leaf in leaves]
    if all(found):
        return params, lambda tree: tree
    if not any(found):
        raise ValueError(
            "params holds no array of floats or complex numbers, but "
            f"{_describe(params)}, so that there is nothing to differentiate; give the "
            "parameters or a module as the first argument, and the batch as the second."
        )
    differentiable = treedef.unflatten(
        leaf if keep else None for leaf, keep in zip(leaves, found, strict=True)
    )

    def join(tree):
        arrays = iter(jax.tree.leaves(tree))
        return treedef.unflatten(
            next(arrays) if keep else leaf
            for leaf, keep in zip(leaves, found, strict=True)
        )

    return differentiable, join
