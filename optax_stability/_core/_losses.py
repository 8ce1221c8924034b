"""Reads the loss from the extra arguments of ``update``.

*Where*: in every transformation that watches, averages or records the loss.

*Cost*: none; under ``shard_map`` one scalar is averaged over the devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_stability._core import _mesh_axes


def given_losses(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """The given losses by argument name: ``value=``, ``loss=``, both or none."""
    named = {name: extra_args.get(name) for name in ("value", "loss")}
    return {name: loss for name, loss in named.items() if loss is not None}


def loss_of(
    extra_args: Mapping[str, Any], *, needed: bool, axis_name: _mesh_axes.AxisName
) -> jax.Array:
    """The loss among the extra arguments, float32[]; 0 if there is none.

    Under ``shard_map`` it is the mean over ``axis_name``, so that all devices make the
    same decision.
    """
    value = next(iter(given_losses(extra_args).values()), None)
    if value is None:
        if needed:
            raise ValueError(
                "the loss is watched, but no loss was given: call tx.update(grads, "
                "state, params, value=loss); with NNX optimizer.update(model, grads, "
                "value=loss); with Linen use optax_stability.flax.TrainState and call "
                "apply_gradients(grads=grads, extra_args={'value': loss}). If a "
                "trainer calls update, and gives no loss: spike_guard(inner, "
                "loss=False) watches the gradient norm alone; with skip_spikes or "
                "branch_on_spike that is value=None, confirm=None. docs/trainers has a "
                "page for each trainer."
            )
        return jnp.zeros((), jnp.float32)
    value = _as_number(value)
    return _mesh_axes.mean(value.astype(jnp.float32), axis_name)


def _as_number(value: Any) -> jax.Array:
    """The loss as an array; raises unless it is one real number."""
    if isinstance(value, str | bytes | Sequence | Mapping) or callable(value):
        raise TypeError(
            f"value must be one number, got a {type(value).__name__}; give the mean "
            "loss of the batch alone, without the auxiliary outputs of has_aux=True."
        )
    try:
        value = jnp.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"value must be one number, got a {type(value).__name__}; give the mean "
            "loss of the batch."
        ) from error
    if value.shape != ():
        raise ValueError(
            f"value must be one number, got shape {value.shape}; give the mean "
            "loss of the batch."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(f"value must be real, got {value.dtype}; give the real loss.")
    return value
