"""Norms of a gradient that were measured once and are used again.

*Problem*: a history, a guard and a clip in one chain all need the norm of the same
gradient. XLA does not recognise a norm inside a loop as the one measured before it, and
would read the gradient twice.

*How*: while a tree is traced, its norms are remembered beside its arrays, which are
compared by identity: an array that was changed on the way is measured.

*Cost*: nothing; without a match, that of ``_norms``.
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
    """Norms that were measured already, and the trees they are of: lists of leaves."""

    trees: list[list]
    axis_name: AxisName
    norms: Norms

    def are_of(self, leaves: list) -> bool:
        """Whether they are the norms of these very arrays, not of equal ones."""
        return any(
            len(leaves) == len(known)
            and all(a is b for a, b in zip(leaves, known, strict=True))
            for known in self.trees
        )


_known: ContextVar[_Known | None] = ContextVar("known", default=None)


@contextmanager
def reuse_norms(tree: Any, norms: Norms, axis_name: AxisName) -> Iterator[None]:
    """Inside the ``with`` block, the norms of this very tree are not measured again."""
    token = _known.set(_Known([jax.tree.leaves(tree)], axis_name, norms))
    try:
        yield
    finally:
        _known.reset(token)


def alias_norms(tree: Any, passed: Any) -> None:
    """Registers ``passed`` as an alias of ``tree``, whose norms may be known.

    For other arrays with the same values, such as what comes out of a barrier.
    """
    known = _known.get()
    if known is not None and known.are_of(jax.tree.leaves(tree)):
        known.trees.append(jax.tree.leaves(passed))


def _recall(tree: Any, axis_name: AxisName) -> Norms | None:
    known = _known.get()
    if known is None or known.axis_name != axis_name:
        return None
    return known.norms if known.are_of(jax.tree.leaves(tree)) else None


def measure(tree: Any, axis_name: AxisName = None) -> Norms:
    """The norms of each leaf and of the whole; measured unless they are known."""
    known = _recall(tree, axis_name)
    return _norms.measure(tree, axis_name) if known is None else known


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
    """The L2 norm of the whole tree, float32[]; measured unless it is known."""
    known = _recall(tree, axis_name)
    return _norms.global_norm(tree, axis_name) if known is None else known.whole
