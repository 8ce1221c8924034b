"""Arrays that rest in the memory of the host and are worked on in that of the device.

*Cost*: nothing for what is where it should be; else a transfer, where it is asked for.
"""

from typing import Any, Literal

import jax

Place = Literal["device", "host"]


def _move(x, space):
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def put(tree: Any, place: Place) -> Any:
    """The tree in the given memory, on the devices it was on."""
    return jax.device_put(tree, jax.memory.Space.Host) if place == "host" else tree


def on_device(x):
    """An array where it can be worked on."""
    return _move(x, jax.memory.Space.Device)


def beside(x, other):
    """An array in the kind of memory that the other is in."""
    return _move(x, jax.typeof(other).memory_space)
