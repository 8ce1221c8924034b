"""A batch that grows with the noise scale.

*Where*: as ``every_k`` of ``accumulate_moments``, around a chain that estimates the
noise scale. *Cost*: a few scalars.

*Source*: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162, §2: a batch near the noise scale balances steps against examples.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_stability._core import _validate
from optax_stability._noise._lookup import only_estimate, whole_gradient


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """Says how many microbatches a step has; made by :func:`batch_size_schedule`.

    Attributes:
      max_k: most microbatches.
      min_k: fewest.
      fraction: of the noise scale that a batch is to have.
    """

    max_k: int
    min_k: int
    fraction: float

    def num_microbatches(self, inner_opt_state: Any) -> jax.Array:
        """K for the next step, int32[], from the state of what is accumulated for."""
        estimate = only_estimate(inner_opt_state)
        size = estimate.microbatch
        low = whole_gradient(estimate)["low"]
        share = self.fraction * low / jnp.where(size > 0, size, 1.0)
        # The exponent of a float is the power of two below it, exactly.
        _, exponent = jnp.frexp(jnp.clip(share, 1.0, self.max_k))
        power = jnp.left_shift(1, exponent - 1)
        return jnp.clip(power, self.min_k, self.max_k).astype(jnp.int32)


def batch_size_schedule(
    max_k: int,
    *,
    min_k: int = 2,
    fraction: float = 1.0,
) -> BatchSizeSchedule:
    """Lets the number of accumulated microbatches follow the noise scale.

    **Rule**, for microbatches of the size b of the last ones, and the lower end of the
    interval of B_simple after the last step, in the same unit::

      K = the largest power of two ≤ fraction·low/b, at least min_k and at most max_k

    **Guarantees**

    * The batch is never larger than what the estimate is sure of, ``min_k`` apart.
    * K changes between steps only, never in a window.

    **Edge cases**: it may fall again. While nothing is known K is ``min_k``. The
    learning rate stays as it is: what goes with a larger batch is up to the optimizer,
    see :func:`scale_learning_rate`. Whether the noise scale is a good guide at all is
    in doubt: see :func:`batch_efficiency`.

    Args:
      max_k: most microbatches of a step.
      min_k: fewest; one alone has no noise to see, so from 2 on.
      fraction: batch, as a share of the noise scale, > 0.

    Returns:
      What :func:`accumulate_moments` takes for ``every_k``. The chain in it must hold
      one :func:`estimate_noise_scale`.

    Raises:
      TypeError: an argument is no number.
      ValueError: an argument is outside its range; or, at ``update``, there is no noise
        scale in the chain, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import accumulate_moments, estimate_noise_scale
      >>> chain = optax.chain(estimate_noise_scale(), optax.sgd(0.1))
      >>> tx = accumulate_moments(chain, batch_size_schedule(max_k=64))
      >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
      >>> print(state.mini_step)
      1

    References:
      McCandlish et al., 2018, arXiv:1812.06162, §2. Deviations: the lower end of the
      interval in place of the estimate, and powers of two, so that chance does not
      move it.
    """
    _validate.check_count("min_k", min_k, 2, "one microbatch has no noise to see")
    _validate.check_count("max_k", max_k, min_k, "it is the most, min_k the fewest")
    _validate.check_interval("fraction", fraction, "(0, inf)", "1 is the default")
    return BatchSizeSchedule(max_k=max_k, min_k=min_k, fraction=fraction)
