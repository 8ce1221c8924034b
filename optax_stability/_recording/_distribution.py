"""How the entries of a tree are distributed: largest, zeros, one mode or two.

*Problem*: a norm does not tell one huge entry from many small ones, nor updates around
zero from updates that are all plus or minus the same.

*Cost*: one pass over the leaves for each quantity. Only element-wise operations, sums
and maxima: what is sharded stays so.

*Source*: bimodality as 1/kurtosis about zero; that updates turn bimodal before a spike,
Molybog et al., "A Theory on Adam Instability in Large-Scale Machine Learning", 2023,
arXiv:2304.09871.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes, _norms, _numerics
from optax_stability._core._in_place import cond_is_cheap, run_if
from optax_stability._core._leafwise import leafwise

# Of the whole, and of each part.
Pair = tuple[jax.Array, jax.Array]

_SMALLEST_NORM = 2.0**-90


class Parts(NamedTuple):
    """What is measured: leaves, or layers of leaves, and where.

    Attributes:
      leaves: the arrays.
      layered: for each leaf, whether every entry along its first axis is a part.
      axis_name: mesh axes to sum over under ``shard_map``.
    """

    leaves: list
    layered: _norms.Layered
    axis_name: _mesh_axes.AxisName = None

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return sum(_norms.count_parts(self.leaves, self.layered))

    def sizes(self) -> jax.Array:
        """The number of entries of each part, on all shards, float32[n_parts]."""
        counts = _norms.count_parts(self.leaves, self.layered)
        sizes = [
            [leaf.size // max(count, 1)] * count
            for leaf, count in zip(self.leaves, counts, strict=True)
        ]
        flat = jnp.array([size for each in sizes for size in each], jnp.float32)
        return self.add_up(flat)

    def add_up(self, values) -> jax.Array:
        """Sums over the shards of each part, [n_parts, …], as sums over the parts."""
        counts = _norms.count_parts(self.leaves, self.layered)
        return _mesh_axes.add_up(values, self.leaves, self.axis_name, counts)

    def times(self, factors) -> list[jax.Array]:
        """Every leaf, in float32, times the factor of its part."""
        by_leaf = _norms.by_parts(factors, self.leaves, self.layered)
        return [
            leaf.astype(jnp.float32) * factor
            for leaf, factor in zip(self.leaves, by_leaf, strict=True)
        ]


class Entries(NamedTuple):
    """What is known of the entries of each part, float32[n_parts] each.

    Attributes:
      largest: max|x|; 0 where there are none.
      nonzero: the number that is not 0; NaN if one is NaN.
      fourth: Σ(scale·x)⁴.
    """

    largest: jax.Array
    nonzero: jax.Array
    fourth: jax.Array


def measure_entries(parts: Parts, scale) -> Entries:
    """Three passes over each part."""

    def measure(batch):
        x, axes = batch.astype(jnp.float32), tuple(range(1, batch.ndim))
        return (
            jnp.max(jnp.abs(x), axis=axes, initial=0),
            # On CPU a sum of signs vectorises, one of comparisons does not.
            jnp.sum(jnp.abs(jnp.sign(x)), axis=axes),
            jnp.sum(jnp.square(jnp.square(x * scale)), axis=axes),
        )

    largest, nonzero, fourth = leafwise(
        measure, parts.leaves, outputs=3, layered=parts.layered
    )
    return Entries(
        largest=_mesh_axes.largest(largest, parts.axis_name),
        nonzero=parts.add_up(nonzero),
        fourth=parts.add_up(fourth),
    )


def scale_of(norms) -> jax.Array:
    """A scale at which no sum of fourth powers overflows.

    One for all parts: a number cut out of a vector for every leaf would be a small
    program of its own.
    """
    finite = _numerics.is_finite(norms)
    return 2.0**24 / jnp.max(norms, initial=_SMALLEST_NORM, where=finite)


def share(counts, sizes) -> Pair:
    """What part of the whole, and of each part, a count is; 0 of nothing."""
    whole = jnp.sum(counts) / jnp.maximum(jnp.sum(sizes), 1.0)
    return whole, counts / jnp.maximum(sizes, 1.0)


def count_nonfinite(parts: Parts, norms) -> jax.Array:
    """The entries of each part that are NaN or Inf; on CPU a pass only if needed."""

    def measure(batch):
        holds = jnp.where(jnp.isfinite(batch), 0.0, 1.0)
        return (jnp.sum(holds, axis=tuple(range(1, batch.ndim))),)

    def count(_):
        (found,) = leafwise(measure, parts.leaves, outputs=1, layered=parts.layered)
        return parts.add_up(found)

    suspect = ~jnp.all(jnp.isfinite(norms))
    none = jnp.zeros_like(norms)
    return run_if(suspect, count, none) if cond_is_cheap() else count(none)


def bimodality(entries: Entries, norms, scale) -> Pair:
    """(Σx²)²/(n·Σx⁴) over the n entries that are not 0; 0 if there are none.

    Of the whole with every part relative to its own size. A part whose norm is below
    1e-16 of the largest reads 0, and so does one below 1e-27.
    """
    squares, finite = jnp.square(jnp.square(norms * scale)), jnp.isfinite(norms)
    measured = (squares > 0) & (entries.fourth > 0) & finite
    ratio = entries.fourth / jnp.where(measured, squares, 1.0)
    kurtosis = jnp.where(measured, entries.nonzero * ratio, 1.0)
    weights = jnp.where(measured, entries.nonzero, 0.0)

    total = jnp.sum(weights * kurtosis)
    whole = jnp.where(total > 0, jnp.sum(weights) / total, 0.0)
    of_each = jnp.where(measured, 1 / kurtosis, 0.0)
    return (
        jnp.where(jnp.all(finite), whole, jnp.nan),
        jnp.where(finite, of_each, jnp.nan),
    )
