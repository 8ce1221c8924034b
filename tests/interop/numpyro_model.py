"""A small model of NumPyro, and its batches."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist


def regression(x, y):
    """Three weights and the spread of what they leave over."""
    with numpyro.plate("features", 3):
        weight = numpyro.sample("weight", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def batches(number, factors=None):
    """Batches of 32 rows; ``factors`` multiply what is observed in some of them."""
    for step in range(number):
        x = jax.random.normal(jax.random.key(step), (32, 3))
        noise = 0.1 * jax.random.normal(jax.random.key(1000 + step), (32,))
        factor = jnp.float32((factors or {}).get(step, 1.0))
        yield x, factor * (x @ jnp.array([1.0, -2.0, 0.5]) + noise)
