"""The parts of a list of leaves: each is a leaf, or a layer of a stacked leaf.

*Cost*: none; parts are counted during tracing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

# For each leaf, whether its first axis is a layer axis.
Layered = tuple[bool, ...]


def count_parts(leaves, layered: Layered) -> list[int]:
    """The number of parts of each leaf: one, or one per layer."""
    return [
        leaf.shape[0] if split else 1
        for leaf, split in zip(leaves, layered, strict=True)
    ]


def by_parts(values, leaves, layered: Layered) -> list[jax.Array]:
    """For each leaf, the values of its parts, in a shape that broadcasts to it."""
    if not leaves:
        return []
    ends = np.cumsum(count_parts(leaves, layered))[:-1]
    return [
        part.reshape(-1, *[1] * (leaf.ndim - 1)) if split else part[0]
        for part, leaf, split in zip(
            jnp.split(values, ends), leaves, layered, strict=True
        )
    ]


def replicated(values):
    """Gathers values that an Explicit mesh shards; use it only for small arrays."""
    if all(axis is None for axis in jax.typeof(values).sharding.spec):
        return values
    return reshard(values, PartitionSpec(*[None] * values.ndim))


def concatenate(parts) -> jax.Array:
    """Concatenates numbers and vectors into one vector."""
    if not parts:
        return jnp.zeros((0,), jnp.float32)
    return jnp.concatenate([replicated(jnp.atleast_1d(part)) for part in parts])
