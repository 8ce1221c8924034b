"""A batch size that follows the noise scale.

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
from optax_stability._noise._lookup import find_estimate, global_readings


@dataclasses.dataclass(frozen=True)
class BatchSizeSchedule:
    """The number of microbatches per step; made by :func:`batch_size_schedule`.

    Attributes:
      max_k: largest number of microbatches.
      min_k: smallest number of microbatches.
      fraction: batch size as a fraction of the noise scale.
    """

    max_k: int
    min_k: int
    fraction: float

    def num_microbatches(self, inner_opt_state: Any) -> jax.Array:
        """K for the next step, int32[], from the state of the chain inside."""
        estimate = find_estimate(inner_opt_state)
        size = estimate.microbatch
        low = global_readings(estimate)[0]["low"]
        target = self.fraction * low / jnp.where(size > 0, size, 1.0)
        # frexp gives 2^(exponent − 1) ≤ target < 2^exponent, exactly.
        _, exponent = jnp.frexp(jnp.clip(target, 1.0, self.max_k))
        power = jnp.left_shift(1, exponent - 1)
        return jnp.clip(power, self.min_k, self.max_k).astype(jnp.int32)


def batch_size_schedule(
    max_k: int,
    *,
    min_k: int = 2,
    fraction: float = 1.0,
) -> BatchSizeSchedule:
    """Lets the number of accumulated microbatches follow the noise scale.

    **Rule**, with b the mean microbatch size of the last step and ``low`` the lower end
    of the interval of B_simple as it is after it, in the same unit::

      K = the largest power of two ≤ fraction·low/b, at least min_k and at most max_k

    **Guarantees**

    * The batch is never larger than ``fraction`` times the lower end of the interval,
      unless ``min_k`` requires it.
    * K changes only between steps, never within an accumulation window.

    **Edge cases**: K may also decrease. K is ``min_k`` until there is an estimate. The
    schedule does not change the learning rate; to adapt it to the batch size, see
    :func:`scale_learning_rate`. It is disputed whether the noise scale is a good guide:
    see :func:`batch_efficiency`.

    Args:
      max_k: largest number of microbatches per step.
      min_k: smallest number, ≥ 2: one microbatch gives no noise estimate.
      fraction: batch size as a fraction of the noise scale, > 0.

    Returns:
      A schedule for the argument ``every_k`` of :func:`accumulate_moments`. The chain
      inside must contain one :func:`estimate_noise_scale`.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range; or, at ``update``, the chain
        contains no noise scale or more than one.

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
      interval in place of the estimate, and powers of two, so that K does not follow
      random fluctuations.
    """
    _validate.check_count("min_k", min_k, 2, "one microbatch gives no noise estimate")
    _validate.check_count("max_k", max_k, min_k, "it must be at least min_k")
    _validate.check_interval("fraction", fraction, "(0, inf)", "1 is the default")
    return BatchSizeSchedule(max_k=max_k, min_k=min_k, fraction=fraction)
