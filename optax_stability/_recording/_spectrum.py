"""The largest singular value of every matrix, followed from step to step.

*Problem*: attention logits and activations grow with the largest singular value of the
weights, which a norm does not show.

*Cost*: two passes over a matrix per iteration. State: one vector per matrix, as long as
its rows. Products are element-wise with sums, so that sharded matrices stay sharded;
only the vectors are gathered.

*Source*: power iteration on AᵀA, Golub & Van Loan, "Matrix Computations", 2013, §8.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_stability._core import _norms, _numerics
from optax_stability._recording._distribution import Parts

# From an arbitrary direction, and from the one that was found last.
_FIRST_ITERATIONS, _ITERATIONS = 32, 2


class Spectrum(NamedTuple):
    """What power iteration remembers.

    Attributes:
      step: int32[] – measurements.
      vectors: float32[…, n] – for every matrix [m, n] or stack of them [l, m, n], the
        right singular vector found last, of length 1.
    """

    step: jax.Array
    vectors: Any


def _is_matrix(leaf, layered: bool) -> bool:
    return leaf.ndim == 2 + int(layered) and leaf.size > 0


def init_spectrum(parts: Parts) -> Spectrum:
    """Starts from a direction that is orthogonal to nothing in particular."""

    def vector(leaf):
        spread = jnp.cos(1.0 + jnp.arange(leaf.shape[-1], dtype=jnp.float32))
        unit = spread / jnp.sqrt(jnp.sum(jnp.square(spread)))
        return jnp.broadcast_to(unit, (*leaf.shape[:-2], leaf.shape[-1]))

    vectors = [
        vector(leaf)
        for leaf, split in zip(parts.leaves, parts.layered, strict=True)
        if _is_matrix(leaf, split)
    ]
    return Spectrum(step=jnp.zeros((), jnp.int32), vectors=vectors)


def _unit(vector):
    """The vector at length 1, and its length; zero stays zero."""
    length = jnp.sqrt(jnp.sum(jnp.square(vector), axis=-1))
    return vector / jnp.where(length > 0, length, 1.0)[..., None], length


def _iterate(matrix, vector):
    """AᵀAv at length 1, and the length of Aᵀu for u = Av at length 1."""
    left, _ = _unit(jnp.sum(matrix * vector[..., None, :], axis=-1))
    image = jnp.sum(matrix * left[..., :, None], axis=-2)
    return _unit(_norms.replicated(image))


def _follow(matrices, usable, spectrum: Spectrum):
    """The singular vectors and values of matrices of norm 1, a few steps on."""

    def step(_, found):
        new = [_iterate(a, v) for a, (v, _) in zip(matrices, found, strict=True)]
        return [
            (jnp.where(keep[..., None], vector, before), length)
            for keep, (vector, length), (before, _) in zip(
                usable, new, found, strict=True
            )
        ]

    count = jnp.where(spectrum.step == 0, _FIRST_ITERATIONS, _ITERATIONS)
    begin = [(v, jnp.zeros(v.shape[:-1], jnp.float32)) for v in spectrum.vectors]
    return lax.fori_loop(0, count, step, begin)


def measure(
    spectrum: Spectrum, parts: Parts, norms
) -> tuple[tuple[jax.Array, jax.Array], Spectrum]:
    """The largest singular value of the whole and of each part; NaN of no matrix.

    Never above the true value, to rounding. A matrix that is zero or not finite leaves
    its vector as it was.
    """
    usable = _numerics.is_finite(norms) & (norms > 0)
    # At norm 1 nothing overflows.
    matrices = parts.times(1 / jnp.where(usable, norms, 1.0))
    usable_parts = _norms.by_parts(usable, parts.leaves, parts.layered)
    chosen = [
        i for i, leaf in enumerate(parts.leaves) if _is_matrix(leaf, parts.layered[i])
    ]
    found = _follow(
        [matrices[i] for i in chosen],
        [jnp.reshape(usable_parts[i], parts.leaves[i].shape[:-2]) for i in chosen],
        spectrum,
    )
    counts = _norms.count_parts(parts.leaves, parts.layered)
    values = [jnp.full(count, jnp.nan, jnp.float32) for count in counts]
    for i, (_, length) in zip(chosen, found, strict=True):
        values[i] = jnp.atleast_1d(length)
    relative = _norms.concatenate(values)
    of_each = norms * jnp.where(usable | jnp.isnan(relative), relative, 1.0)
    whole = jnp.max(of_each, initial=0.0, where=~jnp.isnan(relative))
    spectrum = Spectrum(
        step=_numerics.increment(spectrum.step), vectors=[v for v, _ in found]
    )
    return (whole, of_each), spectrum
