"""Faults inside of the compiled step: in the gradient, and in the update."""

from collections.abc import Callable
from typing import ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_P = ParamSpec("_P")


def with_gradient_factor(
    loss_fn: Callable[_P, jax.Array], factor: ArrayLike
) -> Callable[_P, jax.Array]:
    """The loss, with a gradient that is multiplied by a factor.

    **Guarantees**

    * The loss keeps its value, whatever the factor, while the loss is finite.
    * With a factor of NaN the whole gradient is NaN.

    Args:
      loss_fn: returns the loss, a number.
      factor: such as ``FaultInjector.factors(batch)["gradient"]``.

    Returns:
      A function of the same arguments.

    Example:
      >>> loss_fn = with_gradient_factor(lambda w: w**2, 10.0)
      >>> print(*jax.value_and_grad(loss_fn)(3.0))
      9.0 60.0
    """

    def faulty(*arguments: _P.args, **keywords: _P.kwargs) -> jax.Array:
        loss = loss_fn(*arguments, **keywords)
        return loss + (factor - 1) * (loss - jax.lax.stop_gradient(loss))

    return faulty


def scale_by_surge() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument ``surge``; the last part of a chain.

    *Problem*: a learning rate that is far too high for some steps is the fault that a
    guard cannot see in the gradient. *Cost*: one product per entry.

    **Guarantees**: without the argument updates pass bit for bit; with it they keep
    their dtypes.

    Returns:
      A transformation without a state.

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), scale_by_surge())
      >>> grads = {"w": jnp.ones(())}
      >>> updates, _ = tx.update(grads, tx.init(grads), surge=30.0)
      >>> print(updates["w"])
      -3.0
    """

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, surge=None, **extra_args):
        del params, extra_args
        if surge is None:
            return updates, state
        return jax.tree.map(lambda u: u * jnp.asarray(surge, u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
