"""Reuses the norms of a gradient that were already measured.

*Problem*: a history, a guard and a clip in one chain all need the norm of the same
gradient. XLA does not recognise that a norm inside a loop was already measured before
the loop, and would read the gradient twice.

*How*: during tracing, the norms of a tree are stored together with its arrays. Arrays
are compared by identity, so a tree with a changed array is measured again.

*Cost*: none with a match; without one, the cost of ``_norms``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from optax_stability._core import _norms
from optax_stability._core._mesh_axes import AxisName
from optax_stability._core._norms import Norms


class _Known(NamedTuple):
    """Measured norms, and the trees that have them, each as a list of leaves."""

    trees: list[list]
    axis_name: AxisName
    norms: Norms

    def match(self, leaves: list) -> bool:
        """Whether the norms belong to these arrays, compared by identity."""
        return any(
            len(leaves) == len(known)
            and all(a is b for a, b in zip(leaves, known, strict=True))
            for known in self.trees
        )


_known: ContextVar[_Known | None] = ContextVar("known", default=None)


@contextmanager
def reuse_norms(tree: Any, norms: Norms, axis_name: AxisName) -> Iterator[None]:
    """Inside the ``with`` block, the known norms of ``tree`` are reused."""
    token = _known.set(_Known([jax.tree.leaves(tree)], axis_name, norms))
    try:
        yield
    finally:
        _known.reset(token)


def alias_norms(tree: Any, passed: Any) -> None:
    """Registers ``passed`` as an alias of ``tree``, if the norms of ``tree`` are known.

    Use it for new arrays with the same values, such as the outputs of a barrier.
    """
    known = _known.get()
    if known is not None and known.match(jax.tree.leaves(tree)):
        known.trees.append(jax.tree.leaves(passed))


def _find_known(tree: Any, axis_name: AxisName) -> Norms | None:
    known = _known.get()
    if known is None or known.axis_name != axis_name:
        return None
    return known.norms if known.match(jax.tree.leaves(tree)) else None


def is_known(tree: Any, axis_name: AxisName = None) -> bool:
    """Whether the norms of the tree were measured by an outer transformation."""
    return _find_known(tree, axis_name) is not None


def measure(tree: Any, axis_name: AxisName = None) -> Norms:
    """The norms of each leaf and of the whole tree; measured unless known."""
    known = _find_known(tree, axis_name)
    return _norms.measure(tree, axis_name) if known is None else known


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """The L2 norm of the whole tree, float32[]; measured unless known."""
    known = _find_known(tree, axis_name)
    return _norms.global_norm(tree, axis_name) if known is None else known.total
