"""A conditional step that works in the buffers of what it changes.

*Problem*: ``lax.cond`` copies parameter-sized values that a branch passes through: XLA
counts 80 bytes per parameter around AdamW, and 16 of temporary memory. A loop that runs
once or not at all keeps its carry in place: 64 and 4, the gradient itself.

*Cost*: reverse-mode differentiation does not pass it.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")


def run_if(run, step: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """``step(carry)`` if the bool[] ``run`` holds, and ``carry`` as it is if not.

    Args:
      run: bool[].
      step: returns what it takes, with the same types.
      carry: any tree of arrays.
    """

    def body(loop):
        return jnp.zeros_like(run), step(loop[1])

    return lax.while_loop(lambda loop: loop[0], body, (run, carry))[1]
