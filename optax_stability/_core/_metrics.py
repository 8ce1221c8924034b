"""Reads the metrics of every state of ours inside any optimizer state.

*Problem*: a number deep in ``opt_state[0].inner_states["decay"].inner_state[1]`` is a
number nobody logs.

*Cost*: a walk over the tree on the host. Stored metrics are handed over; those that
follow from a state (``adam/…``) are computed when read, and inside ``jit`` only those
that are used.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from optax_stability._core import _tree

PER_LEAF = "/per_leaf"
State = TypeVar("State")


def _reports(node: Any) -> bool:
    """Whether a node is a state that reports: a tuple class with ``metrics``."""
    return isinstance(node, tuple) and hasattr(type(node), "metrics")


def _is_aside(node: Any) -> bool:
    """Whether a node holds states that are not in use, as a copy of them."""
    return isinstance(node, tuple) and hasattr(type(node), "aside")


def _reporting(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, state) for every reporting state, outer before inner."""

    def stop(node):
        return node is not tree and (_reports(node) or _is_aside(node))

    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]
    for sub_path, node in found:
        if _reports(node):
            yield path + sub_path, node
            yield from _reporting(node, path + sub_path)


def _distinguish(paths: list[tuple]) -> list[str]:
    """The part of each path that differs from the others, as text."""
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


def _by_leaf(state: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Replaces each ``key/per_leaf`` vector by scalars ``key/<leaf name>``."""
    scalars = {}
    for key, value in values.items():
        if key.endswith(PER_LEAF):
            names, stem = _tree.names_of_marks(state.leaves), key.removesuffix(PER_LEAF)
            scalars |= {f"{stem}/{name}": value[i] for i, name in enumerate(names)}
        else:
            scalars[key] = value
    return scalars


def _check_names(state: Any, known: set[str]) -> None:
    """Raises unless a state reports on known leaves only, or on layers of them."""
    if not any(key.endswith(PER_LEAF) for key in state.metrics):
        return
    for name in _tree.names_of_marks(state.leaves):
        if name not in known and name.rpartition("/")[0] not in known:
            raise ValueError(
                f"params has no leaf {name!r}, which {type(state).__name__} reports "
                "on; pass the parameters that the optimizer state was made for."
            )


def _merge(paths: list[tuple], values: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict of all; a key that several use is prefixed by what tells them apart."""
    times = Counter(key for each in values for key in each)
    flat = {}
    for key in times:
        holders = [i for i, each in enumerate(values) if key in each]
        if len(holders) == 1:
            flat[key] = values[holders[0]][key]
            continue
        places = _distinguish([paths[i] for i in holders])
        for place, i in zip(places, holders, strict=True):
            flat[f"{place}/{key}" if place else key] = values[i][key]
    return flat


def reporting_states(tree: Any) -> list[tuple[tuple, Any]]:
    """(path, state) of all states that report, with arrays for NNX variables."""
    # The list makes the state itself a child, so that a bare state is found too.
    return [(path, _tree.pure(node)) for path, node in _reporting([tree])]


def find(tree: Any, kind: type[State]) -> list[State]:
    """All states of one kind inside a tree, outer before inner."""
    return [node for _, node in reporting_states(tree) if isinstance(node, kind)]


def by_leaf(
    found: list[tuple[tuple, Any]], values: list[dict[str, Any]]
) -> dict[str, Any]:
    """One value per scalar metric, vectors taken apart, from those of each state."""
    each = [_by_leaf(node, own) for (_, node), own in zip(found, values, strict=True)]
    return _merge([path for path, _ in found], each)


def metrics(state: Any, *, params: Any = None) -> dict[str, jax.Array]:
    """Reads all metrics of an optimizer state into one flat dict.

    Nothing is printed and nothing is synced to the host: the values are the arrays in
    the state. Works inside and outside ``jit``.

    **Guarantees**

    * Finds every reporting state: bare, in chains, named chains, ``masked``,
      ``partition``, ``MultiSteps``, ``inject_hyperparams``, wrappers of your own, in a
      Flax ``TrainState`` or an ``nnx.Optimizer``.
    * The keys depend on the structure of the state alone, never on values or steps.
    * No metric hides another: a key that several states use is prefixed with what
      distinguishes their places, such as ``decay/adam/update_rms`` in a partition.

    **Edge cases**: without a reporting state the dict is empty.

    Args:
      state: any optimizer state, or an object that holds one.
      params: the parameters (or anything of their structure). With them each
        ``<key>/per_leaf`` vector becomes scalars ``<key>/<leaf name>``; leaves that a
        mask hides from a transformation are left out.

    Returns:
      Metric name to array.

    Raises:
      ValueError: ``params`` has not the leaves that the state reports on.

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
