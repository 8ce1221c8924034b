"""A conditional step that works in the buffers of what it changes.

*Problem*: on CPU, ``lax.cond`` copies parameter-sized values that a branch passes
through. A loop that runs once or not at all keeps its carry in place: around AdamW the
only temporary memory is then the gradient itself.

*Cost*: reverse-mode differentiation does not pass it.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_stability._core._memory_space import beside, on_device

Carry = TypeVar("Carry")


def branching_is_cheap() -> bool:
    """Whether it costs less to ask than to do something that may not be needed.

    On a GPU the host must read what decides, and everything stands still meanwhile: a
    pass over the parameters costs less. Asked while a program is traced.
    """
    return jax.default_backend() == "cpu"


def after(run, *measured):
    """The bool[] ``run``, known only once other things are.

    XLA then reads what those are made from before it is written over. Without it, it
    would keep a copy.

    Args:
      run: bool[].
      measured: arrays of numbers that are not below 0.
    """
    for each in measured:
        run &= ~(jnp.sum(each) < 0)
    return run


def held(tree):
    """The tree as it is, which JAX cannot take out of the loop that it passes."""
    # Around all at once, a barrier would give all the type of the most sharded under
    # ``shard_map``.
    return jax.tree.map(lax.optimization_barrier, tree)


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


def _no_tangent(x):
    """The zero tangent of an array of any dtype."""
    x = jnp.asarray(x)
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _observe(look, run, seen, beside, found):
    def step(carry):
        seen, found = carry
        return held(seen), look(seen, beside, found)

    return run_if(run, step, (seen, found))


@_observe.defjvp
def _observe_jvp(look, primals, tangents):
    """What is seen passes, and its derivative with it; what is found has none."""
    passed, found = _observe(look, *primals)
    return (passed, found), (tangents[1], jax.tree.map(_no_tangent, found))


def observe_if(run, look, seen, beside, found):
    """``look(seen, beside, found)`` if ``run`` holds, and ``found`` if not.

    What is seen comes back as it was, in the same buffers, and only once the look is
    over: what is written into them later needs no copy. Derivatives pass.

    Args:
      run: bool[].
      look: returns the new ``found``, with the same types.
      seen: a tree of arrays to hand on.
      beside: what else is looked at.
      found: what is known so far.

    Returns:
      ``seen`` and what is now found.
    """
    return _observe(look, run, seen, beside, found)


def _as_before(new, old):
    dtype = jnp.asarray(old).dtype
    new = jnp.asarray(new)
    return new if new.dtype == dtype else new.astype(dtype)


def _fits(output, buffer) -> bool:
    """Whether the buffer's dtype holds every value of the output's."""
    return jnp.promote_types(output.dtype, buffer.dtype) == buffer.dtype


def apply_if(run, inner_update, buffers, inner_state, *, then=None):
    """``inner_update(buffers, inner_state)`` if ``run`` holds, zeros if it does not.

    The update is written over what it is made from, where the dtype allows.

    Args:
      run: bool[].
      inner_update: from a tree of arrays and a state to a tree of updates, of the same
        shapes, and the next state.
      buffers: what ``inner_update`` reads.
      inner_state: is kept as it is where ``run`` does not hold.
      then: a bool[], and a function that makes of update and state other ones if that
        holds, and gives them back as they are if not.

    Returns:
      Updates, buffers and state. The buffers hold the update if there was one, wherever
      it fits; elsewhere, and if there was none, they are as they were.
    """
    outputs, _ = jax.eval_shape(inner_update, buffers, inner_state)

    def start(buffer, output):
        fits = _fits(output, buffer)
        return buffer if fits else jnp.zeros_like(buffer, dtype=output.dtype)

    def given(buffer, output, target):
        return target if _fits(output, buffer) else buffer

    def step(carry):
        targets, inner_state = carry
        inputs = jax.tree.map(given, buffers, outputs, targets)
        updates, new_state = inner_update(inputs, inner_state)
        # As optax.MultiSteps does: some states take the dtype of the gradient.
        new_state = jax.tree.map(_as_before, new_state, inner_state)
        return optax.tree.cast_like(updates, targets), new_state

    targets = jax.tree.map(start, buffers, outputs)
    targets, inner_state = run_if(run, step, (targets, inner_state))
    if then is not None:
        runs_then, remake = then
        targets, inner_state = remake(targets, inner_state)
        run |= runs_then
    updates = jax.tree.map(lambda target: jnp.where(run, target, 0), targets)
    return (
        optax.tree.cast_like(updates, outputs),
        jax.tree.map(given, buffers, outputs, targets),
        inner_state,
    )


def _has_bits(x) -> bool:
    """Whether an exclusive or is defined: not for random keys."""
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _as_bits(x):
    """Unsigned integers that hold a float; anything else as it is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _mix(x, y):
    """Exclusive or, bit by bit: ``_mix(_mix(x, y), y)`` is x, and lies where x does."""
    bits = _as_bits(on_device(x)) ^ _as_bits(on_device(y))
    mixed = bits if bits.dtype == x.dtype else lax.bitcast_convert_type(bits, x.dtype)
    return beside(mixed, x)


def exchange_if(run, first, second):
    """``(second, first)`` if ``run`` holds, and both as they are if not; bit for bit.

    Three times the one is mixed into the other: an exchange by copying, which is left
    for random keys, needs room for a third.

    Args:
      run: bool[].
      first: a tree of arrays.
      second: another, with the same shapes and dtypes.
    """
    if not all(map(_has_bits, jax.tree.leaves(first))):
        swapped = functools.partial(jax.tree.map, beside)
        return run_if(
            run,
            lambda pair: (swapped(pair[1], pair[0]), swapped(*pair)),
            (first, second),
        )

    def mixed(pair):
        # What is read passes, so that it is not written over before.
        into, other = pair
        return jax.tree.map(_mix, into, other), held(other)

    first, second = run_if(run, mixed, (first, second))
    second, first = run_if(run, mixed, (second, first))
    return run_if(run, mixed, (first, second))
