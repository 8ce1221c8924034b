"""Runs a step twice and compares the bits: does the machine compute the same again?

*Problem*: some chips compute wrong numbers now and then, without an error (Dixit et al.
2021, "Silent Data Corruptions at Scale", arXiv 2102.11245). Nothing in a log shows it
until the loss does, and then nobody knows since when. A compiled JAX step is a pure
function: run twice from the same state it gives the same bits, or the machine is at
fault.

*Where*: in the training loop, in place of the call of the step, every so many steps.

*Cost*: a verified step takes the time of two, of two copies of its arguments and of
one pass over its results, and memory for three states.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optax_stability._core import _tree, _validate

_T = TypeVar("_T")
_WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def _differ(x: jax.Array, y: jax.Array) -> jax.Array:
    """Whether any bit differs; NaNs of the same bits are equal."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _differ(jax.random.key_data(x), jax.random.key_data(y))
    if jnp.iscomplexobj(x):
        return _differ(x.real, y.real) | _differ(x.imag, y.imag)
    if jnp.issubdtype(x.dtype, jnp.floating):
        word = _WORDS.get(jnp.finfo(x.dtype).bits)
        if word is not None:
            x, y = (jax.lax.bitcast_convert_type(each, word) for each in (x, y))
    return jnp.any(x != y)


@jax.jit
def _first_difference(ones: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """The index of the first pair that differs; the number of pairs if none does."""
    flags = [_differ(x, y) for x, y in zip(ones, others, strict=True)]
    return jnp.argmax(jnp.stack([*flags, jnp.ones((), bool)]))


def _copy(tree: _T) -> _T:
    """New buffers, so that the step may donate them."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def verify_step(
    step: Callable[..., _T], *arguments: Any, attempts: int = 3
) -> tuple[_T, str | None]:
    """Calls a step twice on the same arguments and compares all results bit by bit.

    **Guarantees**

    * If the results agree, they are those of ``step(*arguments)``.
    * If any bit of any array differs, the first such array is named, and the step is
      repeated until two runs in a row agree: their results are returned.
    * The arguments are still there afterwards, also if the step donates them.

    **Edge cases**: NaN equals a NaN of the same bits. A step that is not a pure
    function (Python's random numbers, a counter outside) always differs.

    Args:
      step: a jitted function of its arguments.
      arguments: pytrees of arrays, the arguments of the step.
      attempts: repetitions after a difference, at least 1.

    Returns:
      The results, and the path of the first array that differed; None if all agreed.

    Raises:
      ArithmeticError: no two runs in a row agree.
      ValueError: ``attempts`` is out of range.

    Example:
      >>> step = jax.jit(lambda state, batch: state + batch, donate_argnums=0)
      >>> verify_step(step, jnp.ones(2), jnp.ones(2))
      (Array([2., 2.], dtype=float32), None)
    """
    _validate.check_count("attempts", attempts, 1, "it counts repetitions")
    found = None
    before = step(*_copy(arguments))
    for _ in range(1 + attempts):
        after = step(*_copy(arguments))
        leaves = jax.tree.leaves(after)
        index = int(_first_difference(jax.tree.leaves(before), leaves))
        if index == len(leaves):
            return after, found
        found = found or _tree.leaf_names(after)[index]
        before = after
    raise ArithmeticError(
        f"{found} has other bits in each of {2 + attempts} runs of the same step from "
        "the same state: the device computes wrong numbers, or the step is not a pure "
        "function; train on another device."
    )
