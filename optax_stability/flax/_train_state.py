"""Linen's train state, whose optimizer can be told more than gradients."""

import functools
from collections.abc import Mapping
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` for Linen, whose optimizer can be told more than gradients.

    Fields, ``create`` and everything else are those of
    ``flax.training.train_state.TrainState``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_stability as ost
      >>> from optax_stability.flax import TrainState
      >>> state = TrainState.create(
      ...     apply_fn=None,
      ...     params={"w": jnp.ones(2)},
      ...     tx=ost.spike_guard(ost.safe_adamw(1e-3)),
      ... )
      >>> grads, loss = {"w": jnp.ones(2)}, jnp.float32(2.5)
      >>> state = state.apply_gradients(grads=grads, extra_args={"value": loss})
      >>> print(state.step, ost.metrics(state)["skip/value"])
      1 2.5
    """

    def apply_gradients(
        self, *, grads: Any, extra_args: Mapping[str, Any] | None = None, **kwargs: Any
    ):
        """Updates parameters and optimizer state by one step.

        Args:
          grads: gradients, of the structure of ``params``.
          extra_args: handed to the optimizer's ``update`` by name, such as
            ``{"value": loss}``; ignored by optimizers that take none.
          **kwargs: further fields to replace, as in Flax.

        Returns:
          The next state.
        """
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, **(extra_args or {}))
        told = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, told).apply_gradients(grads=grads, **kwargs)
        return stepped.replace(tx=self.tx)
