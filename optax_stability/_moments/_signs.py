"""What microbatches say of the noise in the L1 norm, the norm of sign-like updates.

*Problem*: Σσᵢ and ‖G‖₁ cannot be told from the mean gradient: where the noise of an
entry is larger than its mean, the mean of |ḡᵢ| is that of the noise. Standard
deviations of single entries need a buffer, and are poorly known from few microbatches.

*Rule*: two sums, each linear in |·|, to which every microbatch is added once. A new
microbatch of weight n and mean x meets the mean y of the earlier ones, of weight N::

  deviation  √(π/2 · nN/(n + N)) · Σᵢ|xᵢ − yᵢ|       mean Σσᵢ
  agreement  √(π/(2n)) · Σᵢ sign(xᵢ)·yᵢ              mean ΣGᵢ²/σᵢ, for a small n

for Gaussian microbatch gradients, whose entries have the variance σᵢ²/n; x and y are
independent, so that no square of a noise remains in the agreement. For any n its mean
is √(π/(2n)) · Σ|Gᵢ|·erf(|Gᵢ|·√(n/2)/σᵢ).

*Cost*: two reductions over each microbatch gradient and two scalars per leaf. Stacked
microbatches cost, on a CPU, a temporary array of their size.

*Source*: the norm is that of "Adaptive Batch Sizes Using Non-Euclidean Gradient Noise
Scales", 2026, arXiv:2602.03001; the sums are ours.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes, _numerics
from optax_stability._core._leafwise import leafwise_sums
from optax_stability._core._numerics import real_dtype, wide_dtype

# Of a standard normal number, √(π/2) times the mean modulus is 1.
_TO_DEVIATION = math.sqrt(math.pi / 2)


class SignMoments(NamedTuple):
    """Statistics in the L1 norm of K microbatch gradients.

    Attributes:
      deviation: real[n_leaves] – (K − 1)·Σσᵢ in the mean, σᵢ the standard deviation of
        one example's gradient in the i-th entry of the leaf.
      agreement: real[n_leaves] – K(K − 1)/2·ΣGᵢ²/σᵢ in the mean, G the true gradient,
        for microbatches of fewer examples than the noise scale.
    """

    deviation: jax.Array
    agreement: jax.Array


def no_signs(like: Any) -> SignMoments:
    """Those of one microbatch, or none."""

    def zeros():
        return jnp.zeros((len(jax.tree.leaves(like)),), real_dtype(like))

    return SignMoments(zeros(), zeros())


def _over_parts(function, *x):
    """``function`` of real arrays; of complex ones the sum over both components."""
    if not _numerics.is_complex(x[0]):
        return function(*x)
    return function(*map(jnp.real, x)) + function(*map(jnp.imag, x))


def between(a: Any, b: Any, axis_name: _mesh_axes.AxisName = None) -> SignMoments:
    """What the merge of two aggregates adds; nothing if one of them is empty.

    Args:
      a: the aggregate of the earlier microbatches, y.
      b: another one, x, of whose mean the sign is taken.
      axis_name: under ``shard_map``, the mesh axes that shard the means.
    """
    dtype = real_dtype(a.mean)

    def terms(y, x):
        wide = wide_dtype(y)
        x, y = x.astype(wide), y.astype(wide)
        distance = _over_parts(lambda p, q: jnp.abs(p - q), x, y)
        agreement = _over_parts(lambda p, q: jnp.sign(p) * q, x, y)
        return distance.astype(dtype), agreement.astype(dtype)

    olds, news = jax.tree.leaves(a.mean), jax.tree.leaves(b.mean)
    sums = leafwise_sums(terms, olds, news, outputs=2)
    distance, agreement = (_mesh_axes.sum_shards(x, news, axis_name) for x in sums)
    n, others = b.moments.weight, a.moments.weight
    counts = (n > 0) & (others > 0)
    pairs = (a.moments.num_microbatches * b.moments.num_microbatches).astype(n.dtype)
    spread = _TO_DEVIATION * jnp.sqrt(n * _numerics.ratio(others, n + others))
    size = _TO_DEVIATION / jnp.sqrt(jnp.where(n > 0, n, 1.0))

    def weighted(factor, values):
        return jnp.where(counts, factor.astype(dtype) * values, 0.0)

    return SignMoments(weighted(spread, distance), weighted(pairs * size, agreement))


def stacked_signs(
    grads: Any, mean: Any, weights, axis_name: _mesh_axes.AxisName = None
) -> SignMoments:
    """Those of microbatches that are stacked along axis 0, each against all others.

    Args:
      grads: the gradients, in float32 at least; those of weight 0 may hold anything.
      mean: their mean ḡ.
      weights: float32[k] – the weights.
      axis_name: under ``shard_map``, the mesh axes that shard the gradients.
    """
    dtype, leaves = real_dtype(mean), jax.tree.leaves(mean)
    kept, total = weights > 0, jnp.sum(weights)
    count = jnp.sum(kept).astype(jnp.float32)
    counts = kept & (count > 1)
    others = jnp.where(counts, total - weights, 1.0)
    safe = jnp.where(counts, weights, 1.0)
    spread = _TO_DEVIATION * jnp.sqrt(safe * _numerics.ratio(total, others))
    spread = (count - 1) / jnp.maximum(count, 1) * spread
    size = (count - 1) / 2 * _TO_DEVIATION / jnp.sqrt(safe)

    def summed(function, factors):
        """The weighted sum over the microbatches, of each leaf."""

        def of_leaf(leaf, y):
            def per_entry(vector):
                return vector.reshape(-1, *[1] * y.ndim)

            terms = _over_parts(
                lambda x, y: function(x, y, per_entry(safe / others).astype(x.dtype)),
                leaf,
                y[None],
            )
            terms = per_entry(factors).astype(terms.dtype) * terms
            terms = jnp.where(per_entry(counts), terms, 0)
            return jnp.sum(terms, dtype=dtype)

        sums = [
            of_leaf(leaf, y)
            for leaf, y in zip(jax.tree.leaves(grads), leaves, strict=True)
        ]
        stacked = jnp.stack(sums) if sums else jnp.zeros((0,), dtype)
        return _mesh_axes.sum_shards(stacked, leaves, axis_name)

    # The mean of the others is ḡ − (x − ḡ)·n/(N − n). No difference is written as it is
    # elsewhere: XLA would store it for both, once more like all the gradients.
    return SignMoments(
        deviation=summed(lambda x, y, _: jnp.abs(y - x), spread),
        agreement=summed(
            lambda x, y, share: jnp.sign(x) * (y + share * y - share * x), size
        ),
    )
