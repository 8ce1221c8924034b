"""Flax's dynamic loss scale, for gradients that were computed elsewhere.

*Problem*: ``DynamicScale`` adapts its scale inside its own ``value_and_grad``, which
has no microbatches: an overflow in one of them would cost the whole step.

*Where*: after :func:`microbatch_gradients`, inside the jitted step.

*Cost*: a few scalars.
"""

import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale


def update_dynamic_scale(
    dynamic_scale: DynamicScale, all_finite: bool | jax.Array
) -> DynamicScale:
    """The next ``DynamicScale``, for gradients that were computed elsewhere.

    **Rule**: that of ``DynamicScale.value_and_grad``, whose code is called::

      not all finite                              scale ← max(scale·backoff, minimum)
      growth_interval + 1 finite steps in a row   scale ← scale·growth

    **Guarantees**

    * At every step the scale and the counter equal those of
      ``DynamicScale.value_and_grad``, for all settings.
    * An overflow in one microbatch halves the scale; the step uses the others.
    * From any initial scale, however large, training continues without intervention
      once the scale is small enough.

    **Edge cases**

    * The gradient is already divided by the scale, so that changes of the scale do not
      change the norms that clipping and ``skip_spikes`` see. Do not divide again.
    * A microbatch that is left out for other reasons (a NaN in the data, zero weight)
      halves the scale as well; the scale grows back.
    * Under ``shard_map`` ``all_finite`` must be the same on every device.
    * Flax starts at a scale of 65536, and the largest float16 number is 65504: average
      the loss in float32.

    Args:
      dynamic_scale: the ``DynamicScale`` of this step.
      all_finite: bool[] – whether no gradient of this step overflowed.

    Returns:
      The ``DynamicScale`` for the next step.

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
    # A function whose gradient is 0 or ∞: Flax's rule only checks for finiteness.
    slope = jnp.where(all_finite, 0.0, jnp.inf)
    return dynamic_scale.value_and_grad(lambda x: slope * x)(1.0).dynamic_scale
