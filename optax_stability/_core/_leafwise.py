"""Reductions over the leaves of a tree, many small leaves at a time.

*Problem*: every leaf is a program of its own to the compiler. A thousand of them take
longer to compile than to run.

*Cost*: small leaves of equal shape are copied side by side; large ones stay where they
are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_stability._core import _norms

# Entries: above it a copy costs more than it saves. And where devices hold parts of
# some matrices, the compiler would have them move the others of that shape.
_SMALL = 2**12

# From arrays [k, …] to several arrays [k, …]: one row for each part.
Measure = Callable[..., tuple[jax.Array, ...]]


def _kinds(columns: Sequence[list], layered: _norms.Layered) -> list[list[int]]:
    """The leaves that can be measured together, by number."""
    kinds: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        alone = layered[i] or row[0].size > _SMALL
        kind = i if alone else tuple(jax.typeof(x) for x in row)
        kinds.setdefault(kind, []).append(i)
    return list(kinds.values())


def _batch(leaves: list, layered: bool) -> jax.Array:
    """The parts side by side along a first axis."""
    return leaves[0] if layered else jnp.stack(leaves)


def _places(kinds: list[list[int]], counts: list[int]) -> np.ndarray:
    """Where the parts of each leaf have come to lie, kind after kind."""
    starts = np.cumsum([0, *counts])
    order = [starts[i] + j for kind in kinds for i in kind for j in range(counts[i])]
    return np.argsort(np.array(order, int))


def leafwise(
    measure: Measure,
    *columns: list,
    outputs: int,
    layered: _norms.Layered | None = None,
) -> tuple[jax.Array, ...]:
    """``measure`` of every leaf, or of every layer of a stacked one, [n_parts] each.

    Args:
      measure: reduces all axes of its arguments but the first.
      columns: lists of leaves; the i-th of each go together and have one shape.
      outputs: how many vectors ``measure`` returns.
      layered: for each leaf, whether every entry along its first axis is a part.
    """
    leaves = columns[0]
    if not leaves:
        return (jnp.zeros((0,), jnp.float32),) * outputs
    layered = (False,) * len(leaves) if layered is None else layered
    kinds = _kinds(columns, layered)
    found = [
        measure(*(_batch([c[i] for i in kind], layered[kind[0]]) for c in columns))
        for kind in kinds
    ]
    back = _places(kinds, _norms.count_parts(leaves, layered))
    return tuple(_norms.concatenate(parts)[back] for parts in zip(*found, strict=True))
