"""The loss among the extra arguments of ``update``.

*Where*: wherever a transformation watches, averages or keeps the loss.

*Cost*: none; under ``shard_map`` one scalar is averaged over the devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes


def given_losses(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """The losses that were given, by name: as ``value=``, ``loss=``, both or none."""
    named = {name: extra_args.get(name) for name in ("value", "loss")}
    return {name: loss for name, loss in named.items() if loss is not None}


def loss_of(
    extra_args: Mapping[str, Any], *, needed: bool, axis_name: _mesh_axes.AxisName
) -> jax.Array:
    """The loss among the extra arguments, float32[]; 0 if there is none.

    Under ``shard_map`` the mean over ``axis_name``: all devices decide alike.
    """
    value = next(iter(given_losses(extra_args).values()), None)
    if value is None:
        if needed:
            raise ValueError(
                "the loss is watched, but none was given: call tx.update(grads, state, "
                "params, value=loss); with NNX optimizer.update(model, grads, "
                "value=loss); with Linen take optax_stability.flax.TrainState and call "
                "apply_gradients(grads=grads, extra_args={'value': loss}). To watch "
                "the gradient norm alone, give value=None and confirm=None."
            )
        return jnp.zeros((), jnp.float32)
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be one number, got shape {jnp.shape(value)}; give the mean "
            "loss of the batch."
        )
    value = jnp.asarray(value, jnp.float32)
    return _mesh_axes.mean(value, axis_name)
