"""A conditional step that works in the buffers of what it changes.

*Problem*: on CPU, ``lax.cond`` copies parameter-sized values that a branch passes
through. A loop that runs once or not at all keeps its carry in place: around AdamW the
only temporary memory is then the gradient itself.

*Cost*: reverse-mode differentiation does not pass it.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
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


def apply_unless(skip, inner_update, updates, inner_state):
    """``inner_update(updates, inner_state)``, or zeros and the old state if ``skip``.

    Where the update has the dtype of the gradient it takes over its buffer.
    """
    outputs, _ = jax.eval_shape(inner_update, updates, inner_state)

    def start(leaf, output):
        same = leaf.dtype == output.dtype
        return leaf if same else jnp.zeros_like(leaf, dtype=output.dtype)

    def step(carry):
        in_place, inner_state = carry

        def given(leaf, output):
            return output if leaf.dtype == output.dtype else leaf

        return inner_update(jax.tree.map(given, updates, in_place), inner_state)

    carry = jax.tree.map(start, updates, outputs), inner_state
    updates, inner_state = run_if(~skip, step, carry)

    def zero(leaf):
        return jnp.where(skip, jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(zero, updates), inner_state
