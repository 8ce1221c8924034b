"""Linen's train state, with extra arguments for the optimizer."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` for Linen, with extra arguments for the optimizer.

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

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any] | None,
        params: Any,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """Creates a state at step 0 as Flax does, with types of the arguments."""
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)

    def apply_gradients(
        self, *, grads: Any, extra_args: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """Updates parameters and optimizer state by one step.

        Args:
          grads: gradients, of the structure of ``params``.
          extra_args: passed to the optimizer's ``update`` by name, such as
            ``{"value": loss}``; ignored by optimizers that take none.
          **kwargs: further fields to replace, as in Flax.

        Returns:
          The next state.
        """
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, **(extra_args or {}))
        with_args = self.replace(tx=optax.GradientTransformation(tx.init, update))
        updated = super(TrainState, with_args).apply_gradients(grads=grads, **kwargs)
        return updated.replace(tx=self.tx)
