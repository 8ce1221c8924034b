"""Chooses code for the platform that a program is compiled for.

*Problem*: ``jax.default_backend()`` is the platform of the machine that traces. A
program that is exported or compiled for another platform would get the wrong code.

*Cost*: none at run time: when a program is lowered for one platform, only its code is
left.
"""

from collections.abc import Callable
from typing import Any

from jax import lax


def by_platform(
    *args: Any,
    cpu: Callable[..., Any],
    accelerator: Callable[..., Any],
    **others: Callable[..., Any],
) -> Any:
    """Returns ``cpu(*args)`` in a program for a CPU, else ``accelerator(*args)``.

    ``others`` are for single kinds of accelerators, such as ``tpu``.
    """
    return lax.platform_dependent(*args, cpu=cpu, default=accelerator, **others)
