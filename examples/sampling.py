"""Samples text from a model of the next token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Below 1, likely tokens are chosen more often than predicted.
TEMPERATURE = 0.8


def generate(
    model: Callable[[jax.Array], jax.Array],
    prompt: jax.Array,
    key: jax.Array,
    length: int,
) -> jax.Array:
    """Continues a prompt that fills the context by ``length`` tokens.

    The whole window is evaluated again for every token: slow, but simple.
    """

    def append(i, carry):
        window, written = carry
        logits = model(window[None])[0, -1] / TEMPERATURE
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return jnp.append(window[1:], token), written.at[i].set(token)

    empty = jnp.zeros(length, prompt.dtype)
    return jax.lax.fori_loop(0, length, append, (prompt, empty))[1]
