"""Flax's dynamic loss scale, for gradients that were computed elsewhere.

*Problem*: ``DynamicScale`` adapts its scale inside its own ``value_and_grad``, which
knows no microbatches: one overflow in one of them would cost the whole step.

*Where*: behind :func:`microbatch_gradients`, inside the jitted step.

*Cost*: a few scalars.
"""

from typing import Any

import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale


def update_dynamic_scale(dynamic_scale: DynamicScale, all_finite: Any) -> DynamicScale:
    """The next ``DynamicScale`` after a step whose gradients were made elsewhere.

    **Rule**: Flax's own, as in ``DynamicScale.value_and_grad``; its code decides::

      not all finite                              scale ← max(scale·backoff, minimum)
      growth_interval + 1 finite steps in a row   scale ← scale·growth

    **Guarantees**

    * Step by step the scale and the counter that ``DynamicScale.value_and_grad`` would
      have, whatever the settings.
    * One microbatch that overflows halves the scale; the step uses the others.
    * Once the scale fits, training goes on by itself, however far too large it was.

    **Edge cases**

    * The gradient is already divided by the scale: clipping and ``skip_spikes`` see
      norms that do not jump with it. Do not divide again.
    * A microbatch that is left out for other reasons, a NaN in the data or no weight,
      halves the scale as well; it grows back.
    * Under ``shard_map`` ``all_finite`` must be the same on every device.
    * Flax begins at 65536 and float16 ends at 65504: average the loss in float32.

    Args:
      dynamic_scale: as it was in this step.
      all_finite: bool[] – whether no gradient of this step overflowed.

    Returns:
      The one for the next step.

    Example:
      >>> from flax.training.dynamic_scale import DynamicScale
      >>> from optax_stability.flax import update_dynamic_scale
      >>> scale = DynamicScale()
      >>> scale = update_dynamic_scale(scale, all_finite=False)
      >>> print(scale.scale, scale.fin_steps)
      32768.0 0

      In a step, with ``gradients = microbatch_gradients(loss_fn, K)``::

        loss, grads, moments = gradients(model, batch, loss_scale=scale.scale)
        scale = update_dynamic_scale(scale, moments.num_microbatches == K)

    References:
      Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740,
      section 3.2, for loss scaling. The rule is that of ``flax.training``.
    """
    # A function whose gradient is 0, or NaN: all that Flax's rule looks at.
    slope = jnp.where(all_finite, 0.0, jnp.nan)
    return dynamic_scale.value_and_grad(lambda x: slope * x)(0.0).dynamic_scale
