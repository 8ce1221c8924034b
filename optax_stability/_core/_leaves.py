"""Compares the leaves of a tree with those that a state was made for.

*Problem*: a gradient with one leaf more than at ``init``, or with a leaf of another
shape, is broadcast without a word or fails far inside.

*Cost*: none at run time; names are made only for an error message.
"""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_stability._core import _tree


def _kind_of(leaf: Any) -> str:
    """What is wrong with a leaf that no norm can be taken of, or an empty string."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        return "" if _is_number(leaf) else f"a {type(leaf).__name__}"
    if dtype == jax.dtypes.float0:
        return "a gradient with respect to integers (float0)"
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "a random key"
    usable = any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))
    return "" if usable else str(dtype)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, numbers.Complex | np.number | np.bool_)


def _as_array(leaf: Any) -> Any:
    """NumPy arrays and plain numbers as arrays; tracers and shapes as they are."""
    if isinstance(leaf, np.ndarray) or _is_number(leaf):
        return jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype)
    return leaf


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; a mark has no array and gives None."""
    tree = _tree.pure(tree)
    leaves = jax.tree.leaves(tree, is_leaf=_tree.is_leaf_mark)
    arrays = [None if _tree.is_leaf_mark(leaf) else leaf for leaf in leaves]
    if any(array is None for array in arrays):
        return dict.fromkeys(_tree.names_of_marks(tree))
    return dict(zip(_tree.leaf_names(tree), arrays, strict=True))


def as_arrays(place: str, tree: Any) -> Any:
    """The tree with a JAX array for each number and each NumPy array.

    Args:
      place: what the tree is, for the message: ``"clip_by_threshold: the gradient"``.
      tree: any tree; ``ShapeDtypeStruct`` leaves stay.

    Raises:
      TypeError: a leaf is neither a number nor an array of numbers.
    """
    leaves = jax.tree.leaves(tree)
    if any(_kind_of(leaf) for leaf in leaves):
        for name, leaf in zip(_tree.leaf_names(tree), leaves, strict=True):
            if found := _kind_of(leaf):
                raise TypeError(
                    f"{place} has {found} in the leaf {name!r}; pass only the arrays "
                    "that are trained: nnx.state(model, nnx.Param) with NNX, "
                    "eqx.filter(model, eqx.is_inexact_array) with Equinox."
                )
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return tree
    return jax.tree.map(_as_array, tree)


def check_inexact(place: str, tree: Any) -> None:
    """Raises TypeError unless every leaf is of a floating-point or complex dtype."""
    leaves = jax.tree.leaves(tree)
    if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves):
        return
    for name, leaf in zip(_tree.leaf_names(tree), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"{place} has the dtype {leaf.dtype} in the leaf {name!r}, which "
                "gradients cannot have; leave the leaf out: nnx.state(model, "
                "nnx.Param) with NNX, eqx.filter(model, eqx.is_inexact_array) with "
                "Equinox, or optax.partition with optax.set_to_zero() for it."
            )


def _fits(known: Any, given: Any) -> bool:
    """Whether two leaves agree in shape, and both are real or both complex."""
    if not (hasattr(known, "dtype") and hasattr(given, "dtype")):
        return True
    as_complex = [jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (known, given)]
    return jnp.shape(known) == jnp.shape(given) and as_complex[0] == as_complex[1]


def _same(known: Any, given: Any) -> bool:
    """Whether nothing has to be said, without making names."""
    known, given = _tree.pure(known), _tree.pure(given)
    if jax.tree.structure(known) != jax.tree.structure(given):
        return False
    return all(map(_fits, jax.tree.leaves(known), jax.tree.leaves(given)))


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return ""
    return f" {leaf.dtype}{tuple(leaf.shape)}"


class WrongLeavesError(ValueError):
    """A tree has other leaves than the one that it belongs to."""


class _Origin(NamedTuple):
    """Where the leaves that a tree must have are from, and what to do if it has others.

    Attributes:
      where: the end of "which was not there …".
      remedy: an imperative.
    """

    where: str
    remedy: str


_AT_INIT = _Origin(
    "at init",
    "make the state anew with tx.init(params), and keep what still fits of the old one "
    "with adopt_state",
)
_IN_THE_GRADIENT = _Origin(
    "in the gradient", "pass the parameters that the gradient belongs to"
)


def check_leaves(
    place: str, known: Any, given: Any, origin: _Origin = _AT_INIT
) -> None:
    """Raises unless ``given`` has the leaves that a state was made for.

    Args:
      place: what ``given`` is, for the message.
      known: a tree of the state: arrays, or marks from ``mark_leaves``, which have no
        shape to compare.
      given: a tree of arrays, or of marks.
      origin: what ``known`` is, for the message.
    """
    if _same(known, given):
        return
    before, now = _named(known), _named(given)
    where, remedy = origin
    for name in [name for name in now if name not in before]:
        raise WrongLeavesError(
            f"{place} has the leaf {name!r}{_describe(now[name])}, which was not there "
            f"{where}; {remedy}."
        )
    for name in [name for name in before if name not in now]:
        raise WrongLeavesError(
            f"{place} lacks the leaf {name!r}{_describe(before[name])}, which was "
            f"there {where} (None is no array: leave out at init what is not trained); "
            f"{remedy}."
        )
    for name, leaf in now.items():
        if not _fits(before[name], leaf):
            raise WrongLeavesError(
                f"{place} has{_describe(leaf)} in the leaf {name!r}, which was"
                f"{_describe(before[name])} {where}; {remedy}."
            )
    if None not in before.values():
        _check_containers(place, known, given, where)


def _check_containers(place: str, known: Any, given: Any, where: str) -> None:
    """Raises WrongLeavesError if equal leaves are in containers of other classes."""
    before, now = (jax.tree.structure(_tree.pure(tree)) for tree in (known, given))
    if before != now:
        raise WrongLeavesError(
            f"{place} has the leaves that were there {where}, in other containers: "
            f"{now} in place of {before}; convert one of them, for example with "
            "flax.core.unfreeze."
        )


def check_params(name: str, params: Any, updates: Any) -> None:
    """Raises WrongLeavesError unless the parameters have the leaves of the gradient."""
    check_leaves(f"{name}: params", updates, params, _IN_THE_GRADIENT)


def places_of(known: Any, given: Any) -> np.ndarray | None:
    """For each leaf of ``given`` its index among the marks ``known``; None if equal.

    Leaves that were there at ``init`` may be missing, such as those whose gradient is
    None.

    Raises:
      WrongLeavesError: a leaf is not among the known ones.
    """
    marks = _tree.mark_leaves(given)
    if jax.tree.structure(marks) == jax.tree.structure(known):
        return None
    before = _tree.names_of_marks(known)
    now = _tree.names_of_marks(marks)
    if before == now:
        return None
    if unknown := [name for name in now if name not in before]:
        raise WrongLeavesError(
            f"the gradient has the leaf {unknown[0]!r}, which was not there at init; "
            "make the state anew with tx.init(params), and keep what still fits of "
            "the old one with adopt_state."
        )
    return np.array([before.index(name) for name in now], np.int32)
