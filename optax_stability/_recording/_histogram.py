"""How many entries lie between successive powers of two.

*Problem*: whether a low-precision format can represent a gradient depends on the
exponents of its entries. A mean does not show them.

*Cost*: one pass over the leaves per bin, in a loop, so that the program stays small.
Only comparisons and sums, no sort and no gather, so a sharded leaf is never moved.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_stability._core import _numerics
from optax_stability._core._leafwise import leafwise
from optax_stability._recording._distribution import Parts

# 2⁻⁴⁰ … 2⁸, computed by NumPy because XLA's exp2 is not exact.
_POWERS = np.exp2(np.arange(-40, 9)).astype(np.float32)
NUM_BINS = len(_POWERS) + 1


def histogram_edges() -> np.ndarray:
    """Returns the bin edges of the ``histogram`` metrics of :func:`record`.

    **Rule**: bin i counts the entries with edges[i] ≤ |x| < edges[i + 1]. Exact zeros
    are in no bin (see ``zero_fraction``); the last bin has no upper limit.

    Returns:
      float32[n_bins + 1]: 0, 2⁻⁴⁰, 2⁻³⁹ … 2⁸, ∞.

    Example:
      >>> edges = histogram_edges()
      >>> print(len(edges), edges[0], edges[-2:])
      51 0.0 [256.  inf]
    """
    return np.concatenate([np.zeros(1, np.float32), _POWERS, [np.float32(np.inf)]])


def measure(parts: Parts) -> tuple[jax.Array, jax.Array]:
    """Entries per bin: of the tree, float32[n_bins], of each part, [n_parts, n_bins].

    Inf is counted in the last bin, NaN in none.
    """
    below = np.nextafter(_POWERS, np.float32(0))
    above = jnp.asarray(np.concatenate([np.zeros(1, np.float32), below]))

    def count(i, counts):
        def measure(batch):
            # |x| does not depend on i: XLA would hoist it, and keep a copy of the leaf.
            x, one = _numerics.size(_numerics.widen(batch)), jnp.float32(1)
            beyond = jnp.where(x > above[i], one, 0) + jnp.where(x < -above[i], one, 0)
            return (jnp.sum(beyond, axis=tuple(range(1, batch.ndim))),)

        (found,) = leafwise(measure, parts.leaves, outputs=1, layered=parts.layered)
        return counts.at[i].set(parts.sum_shards(found))

    # The extra last row stays 0: the differences below then give every bin.
    start = jnp.zeros((len(above) + 1, parts.num_parts), jnp.float32)
    counts = lax.fori_loop(0, len(above), count, start)
    counts = counts[:-1] - counts[1:]
    return jnp.sum(counts, axis=1), counts.T
