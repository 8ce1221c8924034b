"""Reductions over the leaves of a tree, with small leaves in batches.

*Problem*: the compiler generates separate code for every leaf. A thousand leaves take
longer to compile than to run, and on a GPU every leaf is a kernel, or two.

*Cost*: small leaves of equal shape are copied into one array; large ones are not
copied. On a GPU a large leaf is one kernel, which sums its rows; the sums of equal
length are then added up together. What is done to every leaf is traced once for all
leaves of a shape.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_stability._core._parts import Layered, concatenate, count_parts
from optax_stability._core._platform import by_platform

# Above this number of entries a copy costs more than it saves. Also, if only some
# matrices of one shape are sharded, a stack would make the compiler move the others.
_SMALL = 2**12

# Maps arrays [k, …] to a tuple of arrays [k, …], with one row per part.
Measure = Callable[..., tuple[jax.Array, ...]]


def _batches(columns: Sequence[list], layered: Layered) -> list[list[int]]:
    """The leaves that can be measured together, as lists of leaf indices."""
    batches: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        separate = layered[i] or row[0].size > _SMALL
        key = i if separate else tuple(jax.typeof(x) for x in row)
        batches.setdefault(key, []).append(i)
    return list(batches.values())


def _stack(leaves: list, layered: bool) -> jax.Array:
    """Stacks the parts along a first axis."""
    if layered:
        return leaves[0]
    return jnp.stack(leaves) if len(leaves) > 1 else leaves[0][None]


def _positions(batches: list[list[int]], counts: list[int]) -> np.ndarray:
    """The position of each part, in leaf order, in the concatenated batches."""
    starts = np.cumsum([0, *counts])
    order = [starts[i] + j for each in batches for i in each for j in range(counts[i])]
    return np.argsort(np.array(order, int))


def leafwise(
    measure: Measure,
    *columns: list,
    outputs: int,
    layered: Layered | None = None,
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
    batches, measure = _batches(columns, layered), jax.jit(measure)
    found = [
        measure(*(_stack([c[i] for i in each], layered[each[0]]) for c in columns))
        for each in batches
    ]
    order = _positions(batches, count_parts(leaves, layered))
    return tuple(concatenate(parts)[order] for parts in zip(*found, strict=True))


def _sum_parts(*terms) -> tuple[jax.Array, ...]:
    """The sum over all axes but the first."""
    return tuple(jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in terms)


def leafwise_sums(
    terms: Measure,
    *columns: list,
    outputs: int,
    layered: Layered | None = None,
    batches_on_cpu: bool = False,
) -> tuple[jax.Array, ...]:
    """Sums of element-wise ``terms`` over every part: [n_parts] for each term.

    Args:
      terms: maps arrays to a tuple of arrays of the same shape.
      columns: as in :func:`leafwise`.
      outputs: number of terms.
      layered: as in :func:`leafwise`.
      batches_on_cpu: whether small leaves are copied into batches on a CPU too, where
        that saves time to compile, but none to run.
    """
    layered = (False,) * len(columns[0]) if layered is None else layered

    def in_one_stage(*columns):
        def measure(*batch):
            return _sum_parts(*terms(*batch))

        return leafwise(measure, *columns, outputs=outputs, layered=layered)

    @functools.partial(jax.jit, static_argnums=0)
    def sums_of(split, *row):
        return tuple(sum_layers(x, split) for x in terms(*row))

    def one_by_one(*columns):
        sums = [
            sums_of(split, *row) for split, *row in zip(layered, *columns, strict=True)
        ]
        by_term = list(zip(*sums, strict=True)) or [()] * outputs
        return tuple(map(concatenate, by_term))

    @jax.jit
    def rows_of(*row):
        if not _has_rows(row[0]):
            return terms(*row)
        return tuple(jnp.sum(x, axis=-1) for x in terms(*row))

    def rows_first(*columns):
        rows = [rows_of(*row) for row in zip(*columns, strict=True)]
        sums = [list(column) for column in zip(*rows, strict=True)]
        sums = sums or [[]] * outputs
        return leafwise(_sum_parts, *sums, outputs=outputs, layered=layered)

    return by_platform(
        *columns,
        cpu=in_one_stage if batches_on_cpu else one_by_one,
        tpu=in_one_stage,
        accelerator=rows_first,
    )


def sum_layers(leaf, layered: bool) -> jax.Array:
    """The sum of a leaf, or of every layer of it."""
    return jnp.sum(leaf, axis=tuple(range(int(layered), leaf.ndim)))


def _has_rows(leaf) -> bool:
    """Whether the leaf is large, and has rows to sum up first."""
    return leaf.size > _SMALL and leaf.ndim > 1
