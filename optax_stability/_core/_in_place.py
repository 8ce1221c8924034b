"""A conditional step that works in the buffers of what it changes.

*Problem*: on CPU, ``lax.cond`` copies parameter-sized values that a branch passes
through. A loop that runs once or not at all keeps its carry in place: around AdamW the
only temporary memory is then the gradient itself.

*Cost*: reverse-mode differentiation does not pass it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_stability._core._memory_space import to_device, to_memory_of

Carry = TypeVar("Carry")


def cond_is_cheap() -> bool:
    """Whether a conditional costs less than doing the work unconditionally.

    Not on a GPU: there the host must read the condition, and the device waits for it; a
    pass over the parameters costs less. Evaluated while a program is traced.
    """
    return jax.default_backend() == "cpu"


def depends_on(run, *measured):
    """Returns ``run`` with a data dependency on ``measured``.

    XLA then computes those, and reads what they are made from, before it overwrites the
    buffers that a step under ``run`` changes. Without the dependency it keeps a copy.

    Args:
      run: bool[].
      measured: arrays of numbers that are not below 0.
    """
    for each in measured:
        run &= ~(jnp.sum(each) < 0)
    return run


def no_hoist(tree):
    """Applies ``optimization_barrier``, so that the tree stays in the loop's carry.

    JAX would otherwise move a value that the loop does not change out of the loop.
    """
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
def _measure(measure, run, tree, extra, last):
    def step(carry):
        tree, last = carry
        return no_hoist(tree), measure(tree, extra, last)

    return run_if(run, step, (tree, last))


@_measure.defjvp
def _measure_jvp(measure, primals, tangents):
    """The tree passes with its derivative; measurements have none."""
    passed, measured = _measure(measure, *primals)
    return (passed, measured), (tangents[1], jax.tree.map(_no_tangent, measured))


def measure_if(run, measure, tree, extra, last):
    """``measure(tree, extra, last)`` if ``run`` holds, and ``last`` if not.

    The tree is returned unchanged, in the same buffers, with a data dependency on the
    measurement: what overwrites it later needs no copy. Derivatives pass.

    Args:
      run: bool[].
      measure: returns the new measurements, with the types of ``last``.
      tree: the arrays to measure and to hand on.
      extra: what else ``measure`` reads.
      last: the measurements so far.

    Returns:
      ``tree`` and the measurements.
    """
    return _measure(measure, run, tree, extra, last)


def _as_before(new, old):
    dtype = jnp.asarray(old).dtype
    new = jnp.asarray(new)
    return new if new.dtype == dtype else new.astype(dtype)


def _fits(output, buffer) -> bool:
    """Whether the buffer's dtype holds every value of the output's."""
    return jnp.promote_types(output.dtype, buffer.dtype) == buffer.dtype


class Written(NamedTuple):
    """An update that may have been written over what it was made from.

    Attributes:
      targets: tree of arrays – the update if there was one. A target is the buffer it
        was made from wherever that is wide enough, else an array of its own.
      outputs: tree of shapes and dtypes – of the update.
    """

    targets: Any
    outputs: Any

    def updates(self, run) -> Any:
        """The update if the bool[] ``run`` holds, else zeros."""
        chosen = jax.tree.map(lambda target: jnp.where(run, target, 0), self.targets)
        return optax.tree.cast_like(chosen, self.outputs)

    def buffers(self, buffers: Any) -> Any:
        """The buffers, after what was written over them."""

        def latest(buffer, output, target):
            return target if _fits(output, buffer) else buffer

        return jax.tree.map(latest, buffers, self.outputs, self.targets)


def write_if(run, inner_update, buffers, inner_state) -> tuple[Written, Any]:
    """Writes an update over the buffers it is made from, if ``run`` holds.

    Args:
      run: bool[].
      inner_update: from a tree of arrays and a state to a tree of updates, of the same
        shapes, and the next state.
      buffers: what ``inner_update`` reads.
      inner_state: is returned unchanged where ``run`` does not hold.

    Returns:
      The update, and the state.
    """
    outputs, _ = jax.eval_shape(inner_update, buffers, inner_state)

    def start(buffer, output):
        fits = _fits(output, buffer)
        return buffer if fits else jnp.zeros_like(buffer, dtype=output.dtype)

    def step(carry):
        targets, inner_state = carry
        inputs = Written(targets, outputs).buffers(buffers)
        updates, new_state = inner_update(inputs, inner_state)
        # As optax.MultiSteps does: some states take the dtype of the gradient.
        new_state = jax.tree.map(_as_before, new_state, inner_state)
        return optax.tree.cast_like(updates, targets), new_state

    targets = jax.tree.map(start, buffers, outputs)
    targets, inner_state = run_if(run, step, (targets, inner_state))
    return Written(targets, outputs), inner_state


def apply_if(run, inner_update, buffers, inner_state):
    """``inner_update(buffers, inner_state)`` if ``run`` holds, zeros if it does not.

    The update is written over what it is made from, where the dtype allows.

    Args:
      run: bool[].
      inner_update: as :func:`write_if` takes it.
      buffers: what ``inner_update`` reads.
      inner_state: is returned unchanged where ``run`` does not hold.

    Returns:
      Updates, buffers and state. The buffers hold the update if there was one, wherever
      it fits; elsewhere, and if there was none, they are unchanged.
    """
    written, inner_state = write_if(run, inner_update, buffers, inner_state)
    return written.updates(run), written.buffers(buffers), inner_state


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
    bits = _as_bits(to_device(x)) ^ _as_bits(to_device(y))
    mixed = bits if bits.dtype == x.dtype else lax.bitcast_convert_type(bits, x.dtype)
    return to_memory_of(mixed, x)


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
        swapped = functools.partial(jax.tree.map, to_memory_of)
        return run_if(
            run,
            lambda pair: (swapped(pair[1], pair[0]), swapped(*pair)),
            (first, second),
        )

    def mixed(pair):
        # What is read passes, so that it is not written over before.
        into, other = pair
        return jax.tree.map(_mix, into, other), no_hoist(other)

    first, second = run_if(run, mixed, (first, second))
    second, first = run_if(run, mixed, (second, first))
    return run_if(run, mixed, (first, second))
