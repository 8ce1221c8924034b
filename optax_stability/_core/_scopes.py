"""Scopes, the parts of a tree that share one norm: the tree, a leaf, a layer, a group.

*Cost*: scopes are numbered during tracing; norms cost the same as in ``_norms``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from optax_stability._core import _known_norms, _norms, _parts, _tree, _validate

Scope = Literal["global", "leaf"] | Callable[[Any], Any]


class Parts(NamedTuple):
    """The parts of a tree: each is a leaf, or a layer of a stacked leaf.

    Attributes:
      scope: int[n_parts] – the index of the scope of each part, from 0.
      leaf: int[n_parts] – the index of the leaf of each part, from 0.
      layered: for each leaf, whether it is split along its first axis.
    """

    scope: np.ndarray
    leaf: np.ndarray
    layered: tuple[bool, ...]

    @property
    def num_scopes(self) -> int:
        """The number of scopes; an empty tree has one."""
        return int(self.scope.max()) + 1 if self.scope.size else 1

    @property
    def num_leaves(self) -> int:
        """The number of leaves."""
        return len(self.layered)


def per_leaf(prefix, tree) -> list:
    """One value per leaf, from a tree (or tree prefix) of values or a callable."""
    prefix = prefix(tree) if callable(prefix) else prefix
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree))


def split(tree, scope, stacked) -> Parts:
    """Divides a tree into parts and the parts into scopes."""
    leaves = jax.tree.leaves(tree)
    layered = (False,) * len(leaves)
    if stacked is not None:
        flags = per_leaf(stacked, tree)
        for flag in flags:
            _validate.check_flags(stacked=flag)
        layered = tuple(map(bool, flags))
        _check_layers(tree, layered)
    leaf = np.repeat(np.arange(len(leaves)), _parts.count_parts(leaves, layered))
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
                "whose first axis is the layer axis."
            )


def scope_norms(tree, parts: Parts, axis_name):
    """The norm of each scope, real[n_scopes]."""
    if parts.num_scopes == 1:
        return _known_norms.global_norm(tree, axis_name)[None]
    norms = _norms.leaf_norms(tree, axis_name, parts.layered)
    if parts.num_scopes == len(parts.scope):
        return norms
    return _norms.join_norms_by_group(norms, parts.scope, parts.num_scopes)


def per_leaf_vector(values, parts: Parts):
    """For each leaf, the value of its scope; over several layers, √Σ value²."""
    values = values[parts.scope]
    if not any(parts.layered):
        return values
    return _norms.join_norms_by_group(values, parts.leaf, parts.num_leaves)


def for_leaves(values, leaves, parts: Parts) -> list:
    """For each leaf, the value of its scope, in a shape that broadcasts to it."""
    if any(parts.layered):  # Then every part is a separate scope.
        return _parts.by_parts(values, leaves, parts.layered)
    scalars = list(values)
    return [scalars[scope] for scope in parts.scope]
