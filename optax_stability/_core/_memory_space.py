"""Moves arrays between host memory, for storage, and device memory, for computation.

*Cost*: one transfer per array; none if the array is already in the requested memory.
"""

from typing import Any, Literal

import jax

Place = Literal["device", "host"]


def _transfer(x, space):
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def put(tree: Any, place: Place) -> Any:
    """Moves the tree to the given kind of memory, on the same devices."""
    return jax.device_put(tree, jax.memory.Space.Host) if place == "host" else tree


def to_device(x):
    """Moves the array to device memory, where computation is possible."""
    return _transfer(x, jax.memory.Space.Device)


def to_memory_of(x, other):
    """Moves the array to the kind of memory of ``other``."""
    return _transfer(x, jax.typeof(other).memory_space)
