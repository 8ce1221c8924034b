"""The largest singular value of every matrix, by power iteration across steps.

*Problem*: attention logits and activations grow with the largest singular value of the
weights, which a norm does not show.

*Cost*: two passes over a matrix per iteration. State: one vector per matrix, as long as
its rows. Products are written as element-wise products and sums, so that sharded
matrices stay sharded; only the vectors are gathered.

*Source*: power iteration on AᴴA, Golub & Van Loan, "Matrix Computations", 2013, §8.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_stability._core import _numerics, _parts, _tree
from optax_stability._recording._distribution import Parts

# At the first measurement, from an arbitrary vector; later, from the previous vector.
_FIRST_ITERATIONS, _ITERATIONS = 32, 2


class Spectrum(NamedTuple):
    """State of the power iteration.

    Attributes:
      step: int32[] – number of measurements.
      vectors: real[…, n], or complex[…, n] for a complex matrix – for every matrix
        [m, n] or stack of matrices [l, m, n], the last estimate of the right singular
        vector, of length 1.
    """

    step: jax.Array
    vectors: Any


def _is_matrix(leaf, layered: bool) -> bool:
    return leaf.ndim == 2 + int(layered) and leaf.size > 0


def init_spectrum(tree: Any, parts: Parts) -> Spectrum:
    """Starts from a fixed, arbitrary vector."""
    dtype = _numerics.real_dtype(parts.leaves)

    def vector(leaf):
        # Neither sparse nor constant: unlikely to be orthogonal to a singular vector.
        start = jnp.cos(1.0 + jnp.arange(leaf.shape[-1], dtype=dtype))
        unit = start / jnp.sqrt(jnp.sum(jnp.square(start)))
        if _numerics.is_complex(leaf):
            unit = lax.complex(unit, jnp.zeros_like(unit))
        return jnp.broadcast_to(unit, (*leaf.shape[:-2], leaf.shape[-1]))

    vectors = [
        vector(leaf)
        for leaf, split in zip(parts.leaves, parts.layered, strict=True)
        if _is_matrix(leaf, split)
    ]
    vectors = _tree.unless_placeholder(tree, vectors)
    return Spectrum(step=jnp.zeros((), jnp.int32), vectors=vectors)


def _unit(vector):
    """The vector divided by its length, and its length; a zero vector stays zero."""
    length = jnp.sqrt(jnp.sum(_numerics.abs_sq(vector), axis=-1))
    divisor = jnp.where(length > 0, length, 1.0)[..., None]
    return _numerics.by_component(lambda part: part / divisor, vector), length


def _iterate(matrix, vector):
    """Aᴴu divided by its length, and that length, where u = Av/|Av|."""
    left, _ = _unit(jnp.sum(matrix * vector[..., None, :], axis=-1))
    matrix = jnp.conj(matrix) if _numerics.is_complex(matrix) else matrix
    image = jnp.sum(matrix * left[..., :, None], axis=-2)
    return _unit(_parts.replicated(image))


def _iterate_all(matrices, usable, spectrum: Spectrum):
    """Singular vectors and values of matrices of norm 1, after more iterations."""

    def step(_, found):
        new = [_iterate(a, v) for a, (v, _) in zip(matrices, found, strict=True)]
        return [
            (jnp.where(keep[..., None], vector, before), length)
            for keep, (vector, length), (before, _) in zip(
                usable, new, found, strict=True
            )
        ]

    count = jnp.where(spectrum.step == 0, _FIRST_ITERATIONS, _ITERATIONS)
    start = [
        (v, jnp.zeros(v.shape[:-1], jnp.finfo(v.dtype).dtype)) for v in spectrum.vectors
    ]
    return lax.fori_loop(0, count, step, start)


def measure(
    spectrum: Spectrum, parts: Parts, norms
) -> tuple[tuple[jax.Array, jax.Array], Spectrum]:
    """The largest singular value of the tree and of each part; 0 if not a matrix.

    Never above the true value, up to rounding. A matrix that is zero or not finite
    keeps its previous vector.
    """
    usable = _numerics.is_finite(norms) & (norms > 0)
    # Matrices of norm 1 cannot overflow.
    matrices = parts.times(1 / jnp.where(usable, norms, 1.0))
    usable_parts = _parts.by_parts(usable, parts.leaves, parts.layered)
    chosen = [
        i for i, leaf in enumerate(parts.leaves) if _is_matrix(leaf, parts.layered[i])
    ]
    found = _iterate_all(
        [matrices[i] for i in chosen],
        [jnp.reshape(usable_parts[i], parts.leaves[i].shape[:-2]) for i in chosen],
        spectrum,
    )
    counts = _parts.count_parts(parts.leaves, parts.layered)
    values = [jnp.zeros(count, norms.dtype) for count in counts]
    for i, (_, length) in zip(chosen, found, strict=True):
        values[i] = jnp.atleast_1d(length)
    is_matrix = np.repeat(np.isin(np.arange(len(counts)), chosen), counts)
    measured = norms * jnp.where(usable, _parts.concatenate(values), 1.0)
    per_part = jnp.where(is_matrix, measured, 0.0)
    total = jnp.max(per_part, initial=0.0)
    spectrum = Spectrum(
        step=_numerics.increment(spectrum.step), vectors=[v for v, _ in found]
    )
    return (total, per_part), spectrum
