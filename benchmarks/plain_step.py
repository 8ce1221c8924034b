"""A training step of the GPT that is as short as it can be, to compare with.

A scan adds the gradients of the microbatches up, as most people write it; the optimizer
is plain optax, a global-norm clip and AdamW. Nothing is measured but the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from model import next_token_loss

Step = Callable[[nnx.State, jax.Array], tuple[nnx.State, dict[str, jax.Array]]]


def make_plain_step(graphdef: Any, microbatches: int) -> Step:
    """The step of a model and an optimizer with this structure.

    Args:
      graphdef: of model and optimizer.
      microbatches: parts of a batch.

    Returns:
      A function from all arrays and int32[batch, context + 1] to the arrays and loss.
    """

    def step(arrays: nnx.State, windows: jax.Array):
        model, optimizer = nnx.merge(graphdef, arrays)
        definition, params = nnx.split(model)

        def add(total, part):
            def loss_fn(params):
                return next_token_loss(nnx.merge(definition, params), part)

            found = jax.value_and_grad(loss_fn)(params)
            return jax.tree.map(jnp.add, total, found), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        parts = windows.reshape(microbatches, -1, windows.shape[-1])
        total, _ = jax.lax.scan(add, start, parts)
        loss, grads = jax.tree.map(lambda x: x / microbatches, total)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), {"loss": loss}

    return step
