"""Statistics of the entries of a tree: maximum, share of zeros, bimodality.

*Problem*: a norm cannot tell one huge entry from many small ones, nor updates centred
at zero from updates that are all plus or minus the same value.

*Cost*: one pass over the leaves for each quantity. Only element-wise operations, sums
and maxima, so sharded leaves stay sharded.

*Source*: bimodality is 1/kurtosis about zero. Updates become bimodal before a spike:
Molybog et al., "A Theory on Adam Instability in Large-Scale Machine Learning", 2023,
arXiv:2304.09871.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes, _numerics, _parts
from optax_stability._core._in_place import select_if
from optax_stability._core._leafwise import leafwise, leafwise_sums

# One quantity: of the whole tree, and of each part.
Pair = tuple[jax.Array, jax.Array]

_SMALLEST_NORM = 2.0**-90


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves"],
    meta_fields=["layered", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """A tree, split into the parts that are measured: leaves, or layers of leaves.

    Attributes:
      leaves: the arrays.
      layered: for each leaf, whether each index of its first axis is a separate part.
      axis_name: mesh axes to sum over under ``shard_map``.
    """

    leaves: list
    layered: _parts.Layered
    axis_name: _mesh_axes.AxisName = None

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return sum(_parts.count_parts(self.leaves, self.layered))

    def sizes(self) -> jax.Array:
        """The number of entries of each part, over all shards, float32[n_parts]."""
        counts = _parts.count_parts(self.leaves, self.layered)
        sizes = [
            [leaf.size // max(count, 1)] * count
            for leaf, count in zip(self.leaves, counts, strict=True)
        ]
        flat = jnp.array([size for each in sizes for size in each], jnp.float32)
        return self.sum_shards(flat)

    def sum_shards(self, values) -> jax.Array:
        """Adds the values of all shards, [n_parts, …]: local sums become global."""
        counts = _parts.count_parts(self.leaves, self.layered)
        return _mesh_axes.sum_shards(values, self.leaves, self.axis_name, counts)

    def times(self, factors) -> list[jax.Array]:
        """The leaves in the dtype of the factors, each part times its factor."""
        by_leaf = _parts.by_parts(factors, self.leaves, self.layered)
        return [
            _numerics.times(leaf, factor)
            for leaf, factor in zip(self.leaves, by_leaf, strict=True)
        ]


class Entries(NamedTuple):
    """Statistics of the entries x of each part, real[n_parts] each.

    Attributes:
      largest: max|x|; 0 for an empty part.
      nonzero: the number of nonzero entries; NaN if an entry is NaN.
      fourth: Σ|scale·x|⁴.
    """

    largest: jax.Array
    nonzero: jax.Array
    fourth: jax.Array


@jax.jit
def measure_entries(parts: Parts, scale) -> Entries:
    """Measures the entries in three passes over each part."""
    dtype = scale.dtype

    def largest_of(batch):
        axes = tuple(range(1, batch.ndim))
        sizes = jnp.abs(_numerics.cast(batch, dtype))
        return (jnp.max(sizes, axis=axes, initial=0),)

    def terms(leaf):
        x = _numerics.size(_numerics.cast(leaf, dtype))
        # On CPU a sum of signs is vectorised, a sum of comparisons is not.
        return jnp.abs(jnp.sign(x)), jnp.square(jnp.square(x * scale))

    (largest,) = leafwise(largest_of, parts.leaves, outputs=1, layered=parts.layered)
    nonzero, fourth = leafwise_sums(
        terms, parts.leaves, outputs=2, layered=parts.layered, batches_on_cpu=True
    )
    return Entries(
        largest=_mesh_axes.largest(largest, parts.axis_name),
        nonzero=parts.sum_shards(nonzero),
        fourth=parts.sum_shards(fourth),
    )


def safe_scale(norms) -> jax.Array:
    """A scale at which no sum of fourth powers overflows.

    All parts share one scale: indexing a vector of scales would add a small kernel for
    every leaf.
    """
    finite = _numerics.is_finite(norms)
    return 2.0**24 / jnp.max(norms, initial=_SMALLEST_NORM, where=finite)


def share(counts, sizes) -> Pair:
    """Count / size, of the whole tree and of each part; 0 where the size is 0."""
    total = jnp.sum(counts) / jnp.maximum(jnp.sum(sizes), 1.0)
    return total, counts / jnp.maximum(sizes, 1.0)


@jax.jit
def count_nonfinite(parts: Parts, norms) -> jax.Array:
    """The number of NaN and Inf in each part.

    On CPU the leaves are read only if a norm is not finite.
    """
    zero, one = norms.dtype.type(0), norms.dtype.type(1)

    def nonfinite(leaf):
        return (jnp.where(jnp.isfinite(leaf), zero, one),)

    def count(_):
        (found,) = leafwise_sums(
            nonfinite,
            parts.leaves,
            outputs=1,
            layered=parts.layered,
            batches_on_cpu=True,
        )
        return parts.sum_shards(found)

    return select_if(~jnp.all(jnp.isfinite(norms)), count, jnp.zeros_like(norms))


def bimodality(entries: Entries, norms, scale) -> Pair:
    """(Σ|x|²)²/(n·Σ|x|⁴) over the n nonzero entries; 0 if there are none.

    For the whole tree every part is divided by its own RMS. A part whose norm is below
    1e-16 of the largest norm, or below 1e-27, measures 0.
    """
    squares, finite = jnp.square(jnp.square(norms * scale)), jnp.isfinite(norms)
    measured = (squares > 0) & (entries.fourth > 0) & finite
    ratio = entries.fourth / jnp.where(measured, squares, 1.0)
    kurtosis = jnp.where(measured, entries.nonzero * ratio, 1.0)
    weights = jnp.where(measured, entries.nonzero, 0.0)

    weighted = jnp.sum(weights * kurtosis)
    total = jnp.where(weighted > 0, jnp.sum(weights) / weighted, 0.0)
    per_part = jnp.where(measured, 1 / kurtosis, 0.0)
    return (
        jnp.where(jnp.all(finite), total, jnp.nan),
        jnp.where(finite, per_part, jnp.nan),
    )
