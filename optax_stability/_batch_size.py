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

from optax_stability import _validate
from optax_stability._noise_estimator import only_estimate, whole


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """Says how many microbatches a step has; made by :func:`batch_size_schedule`.

    Attributes:
      microbatch_size: weight of a microbatch.
      min_k: fewest microbatches.
      max_k: most.
      fraction: of the noise scale that a batch is to have.
    """

    microbatch_size: float
    min_k: int
    max_k: int
    fraction: float

    def num_microbatches(self, inner_opt_state: Any) -> jax.Array:
        """K for the next step, int32[], from the state of what is accumulated for."""
        low = whole(only_estimate(inner_opt_state))["low"]
        wanted = jnp.maximum(self.fraction * low / self.microbatch_size, 1.0)
        power = jnp.exp2(jnp.floor(jnp.log2(jnp.minimum(wanted, self.max_k))))
        return jnp.clip(jnp.round(power), self.min_k, self.max_k).astype(jnp.int32)


def batch_size_schedule(
    microbatch_size: float,
    *,
    max_k: int,
    min_k: int = 2,
    fraction: float = 1.0,
) -> BatchSizeSchedule:
    """Lets the number of accumulated microbatches follow the noise scale.

    **Rule**, for the lower end of the interval of B_simple after the last step::

      K = the largest power of two ≤ fraction·low/microbatch_size
      but at least min_k and at most max_k

    **Guarantees**

    * The batch is never larger than what the estimate is sure of, ``min_k`` apart.
    * K changes between steps only, never in a window.

    **Edge cases**: it may fall again. While nothing is known K is ``min_k``; with
    ``min_k`` = 1 that is for good, as one microbatch has no noise to see. The learning
    rate stays as it is: what goes with a larger batch is up to the optimizer, see
    :func:`scale_learning_rate`. Whether the noise scale is a good guide at all is in
    doubt: see :func:`batch_efficiency`.

    Args:
      microbatch_size: weight of each microbatch: examples, or what ``weight=`` says.
      max_k: most microbatches of a step.
      min_k: fewest, from 2 on.
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
      >>> tx = accumulate_moments(chain, batch_size_schedule(16, max_k=64))
      >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), weight=16.0)
      >>> print(state.mini_step)
      1

    References:
      McCandlish et al., 2018, arXiv:1812.06162, §2. Deviations: the lower end of the
      interval in place of the estimate, and powers of two, so that chance does not
      move it.
    """
    remedy = "give the examples of one call"
    _validate.check_interval("microbatch_size", microbatch_size, "(0, inf)", remedy)
    _validate.check_size("min_k", min_k, 2)
    _validate.check_size("max_k", max_k, min_k)
    _validate.check_interval("fraction", fraction, "(0, inf)", "1 is the default")
    return BatchSizeSchedule(
        microbatch_size=microbatch_size, min_k=min_k, max_k=max_k, fraction=fraction
    )
