"""Reductions over the leaves of a tree, with small leaves in batches.

*Problem*: the compiler generates separate code for every leaf. A thousand leaves take
longer to compile than to run.

*Cost*: small leaves of equal shape are copied into one array; large ones are not
copied.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_stability._core import _norms

# Above this number of entries a copy costs more than it saves. Also, if only some
# matrices of one shape are sharded, a stack would make the compiler move the others.
_SMALL = 2**12

# Maps arrays [k, …] to a tuple of arrays [k, …], with one row per part.
Measure = Callable[..., tuple[jax.Array, ...]]


def _batches(columns: Sequence[list], layered: _norms.Layered) -> list[list[int]]:
    """The leaves that can be measured together, as lists of leaf indices."""
    batches: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        separate = layered[i] or row[0].size > _SMALL
        key = i if separate else tuple(jax.typeof(x) for x in row)
        batches.setdefault(key, []).append(i)
    return list(batches.values())


def _stack(leaves: list, layered: bool) -> jax.Array:
    """Stacks the parts along a first axis."""
    return leaves[0] if layered else jnp.stack(leaves)


def _positions(batches: list[list[int]], counts: list[int]) -> np.ndarray:
    """The position of each part, in leaf order, in the concatenated batches."""
    starts = np.cumsum([0, *counts])
    order = [starts[i] + j for each in batches for i in each for j in range(counts[i])]
    return np.argsort(np.array(order, int))


def leafwise(
    measure: Measure,
    *columns: list,
    outputs: int,
    layered: _norms.Layered | None = None,
) -> tuple[jax.Array, ...]:
    """Applies ``measure`` to every leaf, or every layer of a stacked leaf: [n_parts].

    Args:
      measure: reduces all axes of its arguments but the first.
      columns: lists of leaves; the i-th leaves of all lists are the arguments of one
        call and have the same shape.
      outputs: number of vectors that ``measure`` returns.
      layered: for each leaf, whether every entry along its first axis is a part.
    """
    leaves = columns[0]
    if not leaves:
        return (jnp.zeros((0,), jnp.float32),) * outputs
    layered = (False,) * len(leaves) if layered is None else layered
    batches = _batches(columns, layered)
    found = [
        measure(*(_stack([c[i] for i in each], layered[each[0]]) for c in columns))
        for each in batches
    ]
    order = _positions(batches, _norms.count_parts(leaves, layered))
    return tuple(_norms.concatenate(parts)[order] for parts in zip(*found, strict=True))
