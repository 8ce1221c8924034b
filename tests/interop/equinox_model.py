"""A small model of Equinox, and its batches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def make_model(seed=0):
    """A network whose activation and dropout rate are leaves, and no arrays."""
    return eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(seed))


def loss_fn(model, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def batches(number, factors=None):
    """Batches of 64 rows; ``factors`` multiply what is to be learned in some.

    With 8 rows the losses scatter twofold, and a good one can look like a spike.
    """
    for step in range(number):
        x = np.random.default_rng(step).standard_normal((64, 3)).astype(np.float32)
        factor = np.float32((factors or {}).get(step, 1.0))
        yield x, factor * np.sin(x.sum(1, keepdims=True))
