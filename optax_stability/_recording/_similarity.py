"""How much successive updates point the same way.

*Cost*: one buffer like the parameters, two passes over it. State: that buffer.

*Source*: the time correlation of Molybog et al., "A Theory on Adam Instability in
Large-Scale Machine Learning", 2023, arXiv:2304.09871, as the cosine of two successive
updates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_stability._core import _norms, _numerics
from optax_stability._core._leafwise import leafwise
from optax_stability._recording._distribution import Parts


class Previous(NamedTuple):
    """What passed before.

    Attributes:
      directions: tree like the updates, in their dtype – every part at length 1.
      norms: float32[n_parts] – and its length; 0 before the first.
    """

    directions: Any
    norms: jax.Array


def init_previous(tree: Any, num_parts: int) -> Previous:
    """Nothing has passed."""
    return Previous(
        directions=jax.tree.map(jnp.zeros_like, tree),
        norms=jnp.zeros((num_parts,), jnp.float32),
    )


def measure(
    previous: Previous, parts: Parts, norms: _norms.Norms
) -> tuple[tuple[jax.Array, jax.Array], Previous]:
    """The cosine with what passed before, of the whole and of each part.

    0 where one of the two is 0, NaN where the new one is not finite: that is not
    remembered.
    """
    usable = _numerics.is_finite(norms.leaves) & (norms.leaves > 0)
    units = parts.times(1 / jnp.where(usable, norms.leaves, 1.0))
    before, treedef = jax.tree.flatten(previous.directions)
    products = [u * b.astype(jnp.float32) for u, b in zip(units, before, strict=True)]
    (of_each,) = leafwise(_sums, products, outputs=1, layered=parts.layered)
    of_each = parts.add_up(of_each)

    weights = _relative(norms.leaves) * _relative(previous.norms)
    whole = jnp.sum(jnp.where(weights > 0, of_each * weights, 0.0))
    whole = jnp.where(_numerics.is_finite(norms.whole), whole, jnp.nan)

    by_leaf = _norms.by_parts(usable, parts.leaves, parts.layered)
    directions = [
        jnp.where(keep, unit.astype(b.dtype), b)
        for keep, unit, b in zip(by_leaf, units, before, strict=True)
    ]
    return (whole, of_each), Previous(
        directions=jax.tree.unflatten(treedef, directions),
        norms=jnp.where(usable, norms.leaves, previous.norms),
    )


def _sums(batch):
    return (jnp.sum(batch, axis=tuple(range(1, batch.ndim))),)


def _relative(norms):
    """Each norm over that of the whole; 0 where there is none."""
    whole = _norms.join_norms(norms)
    return jnp.where(whole > 0, _numerics.relative_to(norms, whole), 0.0)
