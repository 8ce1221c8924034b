"""A small model in NNX and in Linen, and its batches."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Model(nnx.Module):
    """A network with one hidden layer."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class Linen(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(8)(x)))


def mean_square(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def batches(number, factors=None):
    """Batches of 8 rows; ``factors`` multiply what is to be learned in some."""
    for index in range(number):
        x = np.random.default_rng(index).standard_normal((8, 3)).astype(np.float32)
        factor = np.float32((factors or {}).get(index, 1.0))
        yield x, factor * np.sin(x.sum(1, keepdims=True))
