"""Finds and reads the metrics of this library's states inside any optimizer state.

*Problem*: nobody logs a number that is hidden in
``opt_state[0].inner_states["decay"].inner_state[1]``.

*Cost*: one tree traversal on the host. Stored metrics are returned without a copy.
Derived metrics (``adam/…``) are computed when they are read; inside ``jit`` XLA removes
those that are not used.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from optax_stability._core import _states, _tree

# A vector with one entry per leaf of the parameters, which ``state.leaves`` names, and
# one with entries of another kind, such as heads, which ``state.entries`` names.
PER_LEAF, PER_ENTRY = "/per_leaf", "/per_entry"
State = TypeVar("State")


def is_vector(key: str) -> bool:
    """Whether the metric of this name is a vector, with a name for each entry."""
    return key.endswith((PER_LEAF, PER_ENTRY))


def _is_snapshot(node: Any) -> bool:
    """Whether a node holds a snapshot of states, whose metrics are not reported."""
    return isinstance(node, tuple) and hasattr(type(node), "is_snapshot")


def _iterate_states(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, state) for every reporting state, outer before inner."""

    def stop(node):
        return node is not tree and (_states.is_reporting(node) or _is_snapshot(node))

    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]
    for sub_path, node in found:
        if _states.is_reporting(node):
            yield path + sub_path, node
            yield from _iterate_states(node, path + sub_path)


def _distinguish(paths: list[tuple]) -> list[str]:
    """Each path as text, without the prefix and the suffix that all paths share."""
    start, end = 0, 0
    shortest = min(len(path) for path in paths)
    while start < shortest and len({path[start] for path in paths}) == 1:
        start += 1
    while end < shortest - start and len({path[-1 - end] for path in paths}) == 1:
        end += 1
    return [
        jax.tree_util.keystr(path[start : len(path) - end], simple=True, separator="/")
        for path in paths
    ]


def _split_vectors(state: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Replaces each ``key/per_leaf`` vector by scalars ``key/<leaf name>``.

    And each ``key/per_entry`` vector by scalars ``key/<name of the entry>``.
    """
    scalars = {}
    for key, value in values.items():
        if not is_vector(key):
            scalars[key] = value
            continue
        stem, _, kind = key.rpartition("/")
        marks = state.leaves if f"/{kind}" == PER_LEAF else state.entries
        names = _tree.names_of_marks(marks)
        pairs = zip(names, value, strict=True)
        scalars |= {f"{stem}/{name}": each for name, each in pairs}
    return scalars


def _check_names(state: Any, known: set[str]) -> None:
    """Raises if a state reports on an unknown leaf; layers of known leaves are fine."""
    if not any(key.endswith(PER_LEAF) for key in state.metrics):
        return
    for name in _tree.names_of_marks(state.leaves):
        if name not in known and name.rpartition("/")[0] not in known:
            raise ValueError(
                f"params has no leaf {name!r}, which {type(state).__name__} reports "
                "on; pass the parameters that the optimizer state was made for."
            )


def _merge(paths: list[tuple], values: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the dicts; a key of several states gets the distinct part of its path."""
    counts = Counter(key for each in values for key in each)
    flat = {}
    for key in counts:
        holders = [i for i, each in enumerate(values) if key in each]
        if len(holders) == 1:
            flat[key] = values[holders[0]][key]
            continue
        places = _distinguish([paths[i] for i in holders])
        for place, i in zip(places, holders, strict=True):
            flat[f"{place}/{key}" if place else key] = values[i][key]
    return flat


def reporting_states(tree: Any) -> list[tuple[tuple, Any]]:
    """(path, state) of all reporting states, with arrays instead of NNX variables.

    Raises:
      TypeError: ``tree`` is a transformation.
      ValueError: a state was replicated or stacked.
    """
    _states.check_not_transformation(tree)
    # The list makes the tree itself a child, so that a bare state is found as well.
    found = [(path, _tree.pure(node)) for path, node in _iterate_states([tree])]
    for _, node in found:
        _states.check_single(node)
    return found


def find(tree: Any, kind: type[State]) -> list[State]:
    """All states of one kind inside a tree, outer before inner."""
    return [node for _, node in reporting_states(tree) if isinstance(node, kind)]


def by_leaf(
    found: list[tuple[tuple, Any]], values: list[dict[str, Any]]
) -> dict[str, Any]:
    """Merges the metrics of all states; each per-leaf vector is split into scalars."""
    each = [
        _split_vectors(node, own) for (_, node), own in zip(found, values, strict=True)
    ]
    return _merge([path for path, _ in found], each)


def metrics(state: Any, *, params: Any = None) -> dict[str, jax.Array]:
    """Reads all metrics of an optimizer state into one flat dict.

    The values are JAX arrays: reading them prints nothing and copies nothing to the
    host. Works inside and outside ``jit``.

    **Guarantees**

    * Finds every reporting state: bare, in chains, named chains, ``masked``,
      ``partition``, ``MultiSteps``, ``inject_hyperparams``, custom wrappers, in a Flax
      ``TrainState`` or an ``nnx.Optimizer``.
    * The keys depend only on the structure of the state, never on values or steps.
    * No metric overwrites another: a key that several states use gets a prefix, the
      part of the path that differs, such as ``decay/adam/update_rms`` in a partition.

    **Edge cases**: without a reporting state the dict is empty. States of other
    libraries are left alone, also those with a field called ``metrics``. A state class
    of your own is read if it is a NamedTuple with the class attribute
    ``reports_metrics = True`` and a property ``metrics``.

    Args:
      state: any optimizer state, or an object that holds one.
      params: the parameters (or any tree with the same structure). If given, each
        ``<key>/per_leaf`` vector becomes scalars ``<key>/<leaf name>``; leaves that a
        mask hides from a transformation are left out. A ``<key>/per_entry`` vector,
        which has no entry per leaf but one per head or the like, is split as well.

    Returns:
      Dict from metric name to array.

    Raises:
      TypeError: ``state`` is the transformation in place of its state.
      ValueError: ``params`` lacks a leaf that the state reports on; or a state has a
        leading axis, because it was replicated for ``pmap`` or stacked.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import record
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = optax.chain(record("grad"), optax.sgd(0.1))
      >>> _, state = tx.update(params, tx.init(params))
      >>> {key: float(value) for key, value in metrics(state, params=params).items()
      ...  if key.startswith("grad/norm")}
      {'grad/norm': 5.0, 'grad/norm/w': 5.0}
    """
    found = reporting_states(state)
    values = [node.metrics for _, node in found]
    if params is None:
        return _merge([path for path, _ in found], values)
    known = set(_tree.leaf_names(params))
    for _, node in found:
        _check_names(node, known)
    return by_leaf(found, values)
