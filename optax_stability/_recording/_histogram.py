"""How many entries lie between successive powers of two.

*Problem*: whether a low-precision format would hold a gradient is a matter of its
exponents, which no mean shows.

*Cost*: one pass over the leaves per bin, in a loop, so that the program stays small.
Comparisons and sums only: no sort, no gather, nothing that moves a sharded leaf.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_stability._core._leafwise import leafwise
from optax_stability._recording._distribution import Parts

# Made by NumPy: XLA's exp2 is not exact. 2⁻⁴⁰ … 2⁸.
_POWERS = np.exp2(np.arange(-40, 9)).astype(np.float32)
NUM_BINS = len(_POWERS) + 1


def histogram_edges() -> np.ndarray:
    """Where the bins of the ``histogram`` metrics of :func:`record` begin and end.

    **Rule**: bin i counts entries with edges[i] ≤ x < edges[i + 1], x the absolute
    value. 0 itself is in no bin (see ``zero_fraction``); the last bin has no end.

    Returns:
      float32[n_bins + 1]: 0, 2⁻⁴⁰, 2⁻³⁹ … 2⁸, ∞.

    Example:
      >>> edges = histogram_edges()
      >>> print(len(edges), edges[0], edges[-2:])
      51 0.0 [256.  inf]
    """
    return np.concatenate([np.zeros(1, np.float32), _POWERS, [np.float32(np.inf)]])


def measure(parts: Parts) -> tuple[jax.Array, jax.Array]:
    """Entries per bin, of the whole, float32[n_bins], and of each part, [n, n_bins].

    Inf is counted in the last bin, NaN in none.
    """
    below = np.nextafter(_POWERS, np.float32(0))
    above = jnp.asarray(np.concatenate([np.zeros(1, np.float32), below]))

    def count(i, counts):
        def measure(batch):
            # |x| would be the same in every turn, and be kept as a copy.
            x, one = batch.astype(jnp.float32), jnp.float32(1)
            beyond = jnp.where(x > above[i], one, 0) + jnp.where(x < -above[i], one, 0)
            return (jnp.sum(beyond, axis=tuple(range(1, batch.ndim))),)

        (found,) = leafwise(measure, parts.leaves, outputs=1, layered=parts.layered)
        return counts.at[i].set(parts.add_up(found))

    # One row more, for what is above every power: nothing.
    start = jnp.zeros((len(above) + 1, parts.num_parts), jnp.float32)
    counts = lax.fori_loop(0, len(above), count, start)
    counts = counts[:-1] - counts[1:]
    return jnp.sum(counts, axis=1), counts.T
