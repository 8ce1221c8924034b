"""A conditional step without copies, in the form that suits the platform.

*Problem*: on CPU, ``lax.cond`` copies parameter-sized values that a branch returns
unchanged. A loop that runs once or not at all keeps its carry in place: around AdamW
the only temporary memory is then the gradient itself. On an accelerator the same loop
does copy, and the host has to read its condition while the device waits. There the step
is always computed, and its result is selected element by element in the pass that
computes it.

*Derivatives*: JAX cannot reverse a loop whose number of passes is a value. The
derivative is therefore that of ``lax.cond``, which is the same function.

*Cost*: the step is traced twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend import core

from optax_stability._core._memory_space import to_device, to_memory_of
from optax_stability._core._numerics import is_complex, promote
from optax_stability._core._platform import by_platform

Carry = TypeVar("Carry")


def depends_on(run, *measured):
    """Returns ``run`` with a data dependency on ``measured``.

    XLA then computes ``measured``, and reads its inputs, before a step under ``run``
    overwrites their buffers. Without the dependency XLA keeps a copy of the inputs.

    Args:
      run: bool[].
      measured: real arrays.
    """
    for each in measured:
        run &= ~(jnp.sum(each) < -jnp.inf)  # No number is; XLA does not use that.
    return run


def no_hoist(tree):
    """Applies ``optimization_barrier``, so that the tree stays in the loop's carry.

    JAX would otherwise move a value that the loop does not change out of the loop.
    """
    # One barrier per array: under ``shard_map`` a barrier around the whole tree would
    # give all arrays the type of the most sharded one.
    return jax.tree.map(lax.optimization_barrier, tree)


# How a conditional step is carried out: ``run_if`` or ``select_if``.
Conditional = Callable[[Any, Callable[[Carry], Carry], Carry], Carry]


def _with_explicit_inputs(step: Callable[[Carry], Carry], carry: Carry):
    """The step as a function of (carry, inputs), and the values that it closes over.

    JAX differentiates a function with a rule of its own only by its arguments.
    """
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(carry)
    # Not the values, which the function must not outlive.
    jaxpr, structure = traced.jaxpr, jax.tree.structure(shapes)

    def explicit(carry, inputs):
        closed = core.ClosedJaxpr(jaxpr, inputs)
        flat = core.jaxpr_as_fun(closed)(*jax.tree.leaves(carry))
        return jax.tree.unflatten(structure, flat)

    return explicit, traced.consts


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _carry_out(loop, step, run, carry, inputs):
    return loop(run, lambda carry: step(carry, inputs), carry)


@_carry_out.defjvp
def _carry_out_jvp(loop, step, primals, tangents):
    """The derivative of ``lax.cond``; ``run`` has none."""
    del loop
    run, carry, inputs = primals

    def by_cond(carry, inputs):
        return lax.cond(run, step, lambda carry, _: carry, carry, inputs)

    return jax.jvp(by_cond, (carry, inputs), tuple(tangents[1:]))


def run_if(run, step: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Returns ``step(carry)`` if ``run`` is true, else ``carry`` unchanged.

    A loop that runs once or not at all: for steps that rarely run. On an accelerator
    the host reads ``run`` while the device waits, unless ``run`` is a plain bool.

    Args:
      run: bool[], or a plain bool, which is decided during tracing.
      step: maps the carry to a new carry of the same types.
      carry: any tree of arrays.
    """
    if isinstance(run, bool):
        return step(carry) if run else carry
    return _carry_out(_run_once, *_arguments(run, step, carry))


def _run_once(run, step: Callable[[Carry], Carry], carry: Carry) -> Carry:
    def body(loop):
        return jnp.zeros_like(run), step(loop[1])

    return lax.while_loop(lambda loop: loop[0], body, (run, carry))[1]


def _arguments(run, step, carry):
    explicit, inputs = _with_explicit_inputs(step, carry)
    return explicit, run, carry, inputs


def _select(run, new: Carry, old: Carry) -> Carry:
    """The new carry if ``run`` is true; on CPU the loop body runs only then."""
    return by_platform(
        run,
        new,
        old,
        cpu=lambda run, new, old: new,
        accelerator=lambda run, new, old: optax.tree.where(run, new, old),
    )


def select_if(run, step: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """:func:`run_if` for steps that nearly always run, or cost nothing.

    On an accelerator the step is always computed, and its result is selected: the loop
    always runs once, so that XLA removes it.
    """
    return _carry_out(_select_once, *_arguments(run, step, carry))


def _select_once(run, step: Callable[[Carry], Carry], carry: Carry) -> Carry:
    def again(loop):
        return by_platform(
            *loop[:2], cpu=lambda due, _: due, accelerator=lambda _, ended: ended < 1
        )

    def body(loop):
        _, ended, old = loop
        return jnp.zeros_like(run), ended + 1, _select(run, step(old), old)

    # XLA counts the passes of a loop by an integer.
    return lax.while_loop(again, body, (run, jnp.int32(0), carry))[2]


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
    """The tree keeps its tangent; the measurements have tangent 0."""
    passed, measured = _measure(measure, *primals)
    return (passed, measured), (tangents[1], jax.tree.map(_no_tangent, measured))


def measure_if(run, measure, tree, extra, last):
    """Computes ``measure(tree, extra, last)`` if ``run`` is true, else keeps ``last``.

    The tree is returned unchanged, in the same buffers, with a data dependency on the
    measurement, so that a later step can overwrite it without a copy. The tree keeps
    its derivative.

    Args:
      run: bool[], or a plain bool, which is decided during tracing.
      measure: returns the new measurements, with the types of ``last``; it closes over
        no arrays, which a function with a derivative of its own must not.
      tree: the arrays to measure and to return.
      extra: other inputs of ``measure``.
      last: the previous measurements.

    Returns:
      ``tree`` and the measurements.
    """
    if isinstance(run, bool):
        inputs = jax.tree.map(lax.stop_gradient, (tree, extra, last))
        return tree, measure(*inputs) if run else last
    return _measure(measure, run, tree, extra, last)


def _cast_like(new, old):
    dtype = jnp.asarray(old).dtype
    new = jnp.asarray(new)
    return new if new.dtype == dtype else new.astype(dtype)


def _fits(output, buffer) -> bool:
    """Whether the dtype of the buffer can hold every value of the output's dtype."""
    return promote(output.dtype, buffer.dtype) == buffer.dtype


class WrittenUpdate(NamedTuple):
    """An update that may have overwritten its input buffers.

    Attributes:
      targets: tree of arrays – the update, if the step ran. A target is the input
        buffer if its dtype can hold the update, else a separate array.
      outputs: tree of shapes and dtypes – of the update.
    """

    targets: Any
    outputs: Any

    def updates(self, run) -> Any:
        """The update if the bool[] ``run`` is true, else zeros."""
        chosen = jax.tree.map(lambda target: jnp.where(run, target, 0), self.targets)
        return optax.tree.cast_like(chosen, self.outputs)

    def buffers(self, buffers: Any) -> Any:
        """The input buffers after the step: overwritten where the update fits."""

        def latest(buffer, output, target):
            return target if _fits(output, buffer) else buffer

        return jax.tree.map(latest, buffers, self.outputs, self.targets)


def write_if(
    run, inner_update, buffers, inner_state, conditional: Conditional = run_if
) -> tuple[WrittenUpdate, Any]:
    """Computes an update and writes it into its input buffers, if ``run`` is true.

    Args:
      run: bool[].
      inner_update: maps a tree of arrays and a state to a tree of updates, of the same
        shapes, and the next state.
      buffers: the input of ``inner_update``.
      inner_state: returned unchanged if ``run`` is false.
      conditional: how the step is carried out.

    Returns:
      The update, and the state.
    """
    inner_update = jax.jit(inner_update)  # Traced once, and not where it is repeated.
    outputs, _ = jax.eval_shape(inner_update, buffers, inner_state)

    def make_target(buffer, output):
        fits = _fits(output, buffer)
        return buffer if fits else jnp.zeros_like(buffer, dtype=output.dtype)

    def step(carry):
        targets, inner_state = carry
        inputs = WrittenUpdate(targets, outputs).buffers(buffers)
        updates, new_state = inner_update(inputs, inner_state)
        # As in optax.MultiSteps: some states take the dtype of the gradient.
        new_state = jax.tree.map(_cast_like, new_state, inner_state)
        return optax.tree.cast_like(updates, targets), new_state

    targets = jax.tree.map(make_target, buffers, outputs)
    targets, inner_state = conditional(run, step, (targets, inner_state))
    return WrittenUpdate(targets, outputs), inner_state


def apply_if(
    run, inner_update, buffers, inner_state, conditional: Conditional = run_if
):
    """Returns ``inner_update(buffers, inner_state)`` if ``run`` is true, else zeros.

    The update is written into its input buffers where the dtype allows it.

    Args:
      run: bool[].
      inner_update: as in :func:`write_if`.
      buffers: the input of ``inner_update``.
      inner_state: returned unchanged if ``run`` is false.
      conditional: how the step is carried out.

    Returns:
      Updates, buffers and state. If ``run`` is true, each buffer that can hold its
      update contains it; all other buffers are unchanged.
    """
    written, inner_state = write_if(
        run, inner_update, buffers, inner_state, conditional
    )
    return written.updates(run), written.buffers(buffers), inner_state


def _has_bits(x) -> bool:
    """Whether exclusive or is defined for the dtype; it is not for random keys."""
    kinds = jnp.inexact, jnp.integer, jnp.bool_
    return any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _as_bits(x):
    """Bitcasts floats to unsigned integers; returns other dtypes unchanged."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _xor(x, y):
    """Bitwise exclusive or, in the memory of x: ``_xor(_xor(x, y), y)`` is x."""
    if is_complex(x):
        parts = to_device(x), to_device(y)
        real, imag = (_xor(*(part(z) for z in parts)) for part in (jnp.real, jnp.imag))
        return to_memory_of(lax.complex(real, imag), x)
    bits = _as_bits(to_device(x)) ^ _as_bits(to_device(y))
    result = bits if bits.dtype == x.dtype else lax.bitcast_convert_type(bits, x.dtype)
    return to_memory_of(result, x)


def _no_float(tangent) -> bool:
    return tangent.dtype == jax.dtypes.float0


@jax.custom_jvp
def exchange_if(run, first, second):
    """Returns ``(second, first)`` if ``run`` is true, else ``(first, second)``; exact.

    The trees are exchanged in place by three bitwise exclusive ors. Trees with random
    keys are exchanged by copying, which needs memory for a third tree.

    Args:
      run: bool[].
      first: a tree of arrays.
      second: a tree with the same shapes and dtypes.
    """
    if not all(map(_has_bits, jax.tree.leaves(first))):
        move = functools.partial(jax.tree.map, to_memory_of)
        return run_if(
            run,
            lambda pair: (move(pair[1], pair[0]), move(*pair)),
            (first, second),
        )

    def xor_into_first(pair):
        # The loop returns ``other`` as well, so that it is not overwritten before it is
        # read.
        target, other = pair
        return jax.tree.map(_xor, target, other), no_hoist(other)

    first, second = run_if(run, xor_into_first, (first, second))
    second, first = run_if(run, xor_into_first, (second, first))
    return run_if(run, xor_into_first, (first, second))


@exchange_if.defjvp
def _exchange_if_jvp(primals, tangents):
    """Tangents are exchanged by a select: bits have no derivative."""
    run, (_, first, second) = primals[0], tangents

    def choose(if_true, if_false):
        return jax.tree.map(
            lambda x, y: x if _no_float(x) else jnp.where(run, x, y), if_true, if_false
        )

    return exchange_if(*primals), (choose(second, first), choose(first, second))
