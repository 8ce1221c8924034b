"""Arrays that rest in the memory of the host and are worked on in that of the device.

*Cost*: nothing for what is where it should be; else a transfer, where it is asked for.
"""

from typing import Any, Literal

import jax

Place = Literal["device", "host"]


def _transfer(x, space):
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def put(tree: Any, place: Place) -> Any:
    """The tree in the given memory, on the devices it was on."""
    return jax.device_put(tree, jax.memory.Space.Host) if place == "host" else tree


def to_device(x):
    """The array in the memory of the device, where it can be computed with."""
    return _transfer(x, jax.memory.Space.Device)


def to_memory_of(x, other):
    """The array in the kind of memory that ``other`` is in."""
    return _transfer(x, jax.typeof(other).memory_space)
