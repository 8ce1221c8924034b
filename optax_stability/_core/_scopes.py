"""Which parts of a tree share one norm: all, a leaf, a layer of a leaf, a group.

*Cost*: numbers of scopes are worked out while tracing; norms are those of ``_norms``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from optax_stability._core import _known_norms, _norms, _tree

Scope = Literal["global", "leaf"] | Callable[[Any], Any]


class Parts(NamedTuple):
    """What has a norm of its own: a leaf, or a layer of a stacked leaf.

    Attributes:
      scope: int[n_parts] – the number of the scope each part is in, counted from 0.
      leaf: int[n_parts] – the number of the leaf each part belongs to.
      layered: for each leaf, whether it is split along its first axis.
    """

    scope: np.ndarray
    leaf: np.ndarray
    layered: tuple[bool, ...]

    @property
    def num_scopes(self) -> int:
        """How many streams there are; an empty tree has one."""
        return int(self.scope.max()) + 1 if self.scope.size else 1

    @property
    def num_leaves(self) -> int:
        """How many leaves there are."""
        return len(self.layered)


def per_leaf(prefix, tree) -> list:
    """A value for every leaf, from a tree (or prefix) of values or a callable."""
    prefix = prefix(tree) if callable(prefix) else prefix
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree))


def split(tree, scope, stacked) -> Parts:
    """Divides a tree into parts and the parts into scopes."""
    leaves = jax.tree.leaves(tree)
    layered = (False,) * len(leaves)
    if stacked is not None:
        layered = tuple(bool(each) for each in per_leaf(stacked, tree))
        _check_layers(tree, layered)
    leaf = np.repeat(np.arange(len(leaves)), _norms.count_parts(leaves, layered))
    if scope == "global":
        return Parts(np.zeros_like(leaf), leaf, layered)
    if scope == "leaf":
        return Parts(np.arange(len(leaf)), leaf, layered)
    labels = per_leaf(scope, tree)
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return Parts(np.array([numbers[label] for label in labels], int), leaf, layered)


def _check_layers(tree, layered):
    names = zip(_tree.leaf_names(tree), jax.tree.leaves(tree), layered, strict=True)
    for name, leaf, split in names:
        if split and leaf.ndim == 0:
            raise ValueError(
                f"stacked marks {name!r}, a scalar without layers; mark only leaves "
                "whose first axis counts layers."
            )


def scope_norms(tree, parts: Parts, axis_name):
    """The norm of each scope, float32[n_scopes]."""
    if parts.num_scopes == 1:
        return _known_norms.global_norm(tree, axis_name)[None]
    norms = _norms.leaf_norms(tree, axis_name, parts.layered)
    if parts.num_scopes == len(parts.scope):
        return norms
    return _norms.join_norms_by_group(norms, parts.scope, parts.num_scopes)


def per_leaf_vector(values, parts: Parts):
    """The value of the scope each leaf is in; of its layers together, √Σ²."""
    values = values[parts.scope]
    if not any(parts.layered):
        return values
    return _norms.join_norms_by_group(values, parts.leaf, parts.num_leaves)


def for_leaves(values, leaves, parts: Parts) -> list:
    """The value of its scope for each leaf, in a shape that broadcasts against it."""
    if any(parts.layered):  # Then every part is a scope of its own.
        return _norms.by_parts(values, leaves, parts.layered)
    scalars = list(values)
    return [scalars[scope] for scope in parts.scope]
