"""The cosine similarity of successive updates.

*Cost*: one buffer like the parameters, two passes over it. State: that buffer.

Of complex updates it is the real part of their inner product, over their norms: the
cosine of the vectors of their real and imaginary parts.

*Source*: the time correlation of Molybog et al., "A Theory on Adam Instability in
Large-Scale Machine Learning", 2023, arXiv:2304.09871, here as the cosine of two
successive updates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _norms, _numerics, _parts
from optax_stability._core._leafwise import leafwise
from optax_stability._recording._distribution import Parts


class Previous(NamedTuple):
    """The updates at the previous measurement.

    Attributes:
      directions: tree like the updates, in their dtype – each part divided by its norm.
      norms: real[n_parts] – norm of each part; 0 before the first measurement.
    """

    directions: Any
    norms: jax.Array


def init_previous(tree: Any, num_parts: int, dtype: Any) -> Previous:
    """Zeros: there is no previous measurement."""
    return Previous(
        directions=jax.tree.map(jnp.zeros_like, tree),
        norms=jnp.zeros((num_parts,), dtype),
    )


def measure(
    previous: Previous, parts: Parts, norms: _norms.Norms
) -> tuple[tuple[jax.Array, jax.Array], Previous]:
    """The cosine with the previous updates, of the whole tree and of each part.

    It is 0 where either is 0, and NaN where the new updates are not finite. Non-finite
    parts are not remembered.
    """
    usable = _numerics.is_finite(norms.leaves) & (norms.leaves > 0)
    units = parts.times(1 / jnp.where(usable, norms.leaves, 1.0))
    before, treedef = jax.tree.flatten(previous.directions)
    products = [
        _numerics.inner_product(u, _numerics.cast(b, norms.leaves.dtype))
        for u, b in zip(units, before, strict=True)
    ]
    (per_part,) = leafwise(_sums, products, outputs=1, layered=parts.layered)
    per_part = parts.sum_shards(per_part)

    weights = _relative(norms.leaves) * _relative(previous.norms)
    total = jnp.sum(jnp.where(weights > 0, per_part * weights, 0.0))
    total = jnp.where(_numerics.is_finite(norms.total), total, jnp.nan)

    by_leaf = _parts.by_parts(usable, parts.leaves, parts.layered)
    directions = [
        jnp.where(keep, unit.astype(b.dtype), b)
        for keep, unit, b in zip(by_leaf, units, before, strict=True)
    ]
    return (total, per_part), Previous(
        directions=jax.tree.unflatten(treedef, directions),
        norms=jnp.where(
            usable, norms.leaves.astype(previous.norms.dtype), previous.norms
        ),
    )


def _sums(batch):
    return (jnp.sum(batch, axis=tuple(range(1, batch.ndim))),)


def _relative(norms):
    """Each norm divided by the global norm; 0 if the global norm is 0."""
    total = _norms.join_norms(norms)
    return jnp.where(total > 0, _numerics.relative_to(norms, total), 0.0)
