"""Names of the leaves of a tree, with or without their arrays.

*Cost*: nothing on the device; names depend only on the structure of the tree.
"""

import itertools
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import jax


class Leaf(NamedTuple):
    """Placeholder for a leaf: keeps the paths of a tree without its arrays."""


def is_leaf_mark(node: Any) -> bool:
    return isinstance(node, Leaf)


def is_variable(node: Any) -> bool:
    """Whether ``node`` is a Flax NNX variable; never imports Flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def pure(tree: Any) -> Any:
    """Replaces each NNX variable by its value; other trees are returned unchanged."""
    return jax.tree.map(
        lambda node: node.get_value() if is_variable(node) else node,
        tree,
        is_leaf=is_variable,
    )


def is_placeholder(tree: Any) -> bool:
    """Whether ``tree`` is what ``optax.tree.map_params`` gives ``init`` for parameters.

    It is a node of a class of its own, with nothing in it. optax takes what holds it
    for a tree of arrays like the parameters, and every leaf for anything else: what
    depends on the structure of the parameters, and is no such tree, has to be a leaf.
    """
    if tree is None or isinstance(tree, Collection):
        return False
    structure = jax.tree.structure(tree)
    return structure.num_nodes == 1 and structure.num_leaves == 0


def unless_placeholder(tree: Any, made: Any) -> Any:
    """What was made of a tree; a number, that is a leaf, if it is no tree."""
    return 0 if is_placeholder(tree) else made


def mark_leaves(tree: Any) -> Any:
    """Replaces every leaf by a :class:`Leaf`: keeps the paths, needs no memory."""
    return unless_placeholder(tree, jax.tree.map(lambda _: Leaf(), pure(tree)))


def mark_entries(shape: tuple[int, ...]) -> Any:
    """One mark per entry of an array, so that ``[2, 3]`` has the name ``2/3``."""
    if not shape:
        return Leaf()
    return tuple(mark_entries(shape[1:]) for _ in range(shape[0]))


def number_leaves(marks: Any) -> Any:
    """Numbers the leaves of a tree from :func:`mark_leaves`: 0, 1, 2 …."""
    count = itertools.count()
    return jax.tree.map(
        lambda node: next(count) if is_leaf_mark(node) else node,
        marks,
        is_leaf=is_leaf_mark,
    )


def leaf_names(params: Any) -> list[str]:
    """Names the leaves of a tree, in ``jax.tree.leaves`` order.

    Entry ``i`` names entry ``i`` of every ``…/per_leaf`` metric.

    **Guarantees**

    * One name per leaf, all different.
    * The same names for an NNX state, for the same tree with plain arrays, and for
      ``ShapeDtypeStruct`` leaves.

    **Edge cases**: a single bare array has the name ``"params"``. If joining the keys
    with ``/`` would give two leaves the same name (a key contains ``/``), all names are
    written as subscripts, ``['a/b']``.

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
    """The names of the leaves in a tree from :func:`mark_leaves`."""
    marked = jax.tree_util.tree_flatten_with_path(marks, is_leaf=is_leaf_mark)[0]
    paths = [path for path, node in marked if is_leaf_mark(node)]
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        for path in paths
    ]
    if len(set(names)) < len(names):
        return [jax.tree_util.keystr(path) for path in paths]
    return names
