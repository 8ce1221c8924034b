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

from optax_stability import _tree

_PER_LEAF = "/per_leaf"
State = TypeVar("State")


def _reports(node: Any) -> bool:
    """Whether a node is a state that reports: a tuple class with ``metrics``."""
    return isinstance(node, tuple) and hasattr(type(node), "metrics")


def _reporting(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, state) for every reporting state, outer before inner."""

    def stop(node):
        return node is not tree and _reports(node)

    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]
    for sub_path, node in found:
        if _reports(node):
            yield path + sub_path, node
            yield from _reporting(node, path + sub_path)


def find(tree: Any, kind: type[State]) -> list[State]:
    """All states of one kind inside a tree, outer before inner."""
    found = (node for _, node in _reporting([tree]))
    return [_tree.pure(node) for node in found if isinstance(node, kind)]


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


def _by_leaf(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Replaces each ``key/per_leaf`` vector by scalars ``key/<leaf name>``."""
    scalars = {}
    for key, value in values.items():
        if key.endswith(_PER_LEAF):
            stem = key.removesuffix(_PER_LEAF)
            scalars |= {f"{stem}/{name}": value[i] for i, name in enumerate(names)}
        else:
            scalars[key] = value
    return scalars


def _expand(state: Any, known: set[str]) -> dict[str, Any]:
    """The metrics of one state, its vectors by leaf name."""
    values = state.metrics
    if not any(key.endswith(_PER_LEAF) for key in values):
        return values
    names = _tree.names_of_marks(state.leaves)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"params has no leaf {unknown[0]!r}, which {type(state).__name__} reports "
            "on; pass the parameters that the optimizer state was made for."
        )
    return _by_leaf(values, names)


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
    # The list makes the state itself a child, so that a bare state is found too.
    found = [(path, _tree.pure(node)) for path, node in _reporting([state])]
    if params is None:
        values = [node.metrics for _, node in found]
    else:
        known = set(_tree.leaf_names(params))
        values = [_expand(node, known) for _, node in found]

    times = Counter(key for each in values for key in each)
    flat = {}
    for key in times:
        holders = [i for i, each in enumerate(values) if key in each]
        if len(holders) == 1:
            flat[key] = values[holders[0]][key]
            continue
        places = _distinguish([found[i][0] for i in holders])
        for place, i in zip(places, holders, strict=True):
            flat[f"{place}/{key}" if place else key] = values[i][key]
    return flat
