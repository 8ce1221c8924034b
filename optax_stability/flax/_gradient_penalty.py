"""Adds the norm of the gradient to the loss, for NNX modules.

*Problem*: a module is more than its parameters, and the penalty evaluates it twice.

*Where* and *cost*: as for :func:`optax_stability.penalize_gradient_norm`.
"""

from collections.abc import Callable
from typing import Any, Concatenate

import jax
from flax import nnx

from optax_stability._core import _tree
from optax_stability._gradients import _penalty
from optax_stability._gradients._penalty import P, Value
from optax_stability.flax._microbatching import Module


def penalize_gradient_norm(
    loss_fn: Callable[Concatenate[Module, P], Value],
    weight: float | jax.Array,
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
) -> Callable[Concatenate[Module, P], Value]:
    """:func:`optax_stability.penalize_gradient_norm` for an NNX module.

    **Rule**: that of the functional version, with respect to the variables that ``wrt``
    selects.

    **Guarantees**: those of the functional version. Both evaluations of the module
    start from the same random keys, so dropout is the same. Variables that ``loss_fn``
    writes are updated once.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs) -> loss``, or ``(loss, aux)``.
      weight: λ ≥ 0, may be traced.
      wrt: filter that selects the variables of the gradient, as in ``nnx.Optimizer``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      A function like ``loss_fn``, for ``nnx.value_and_grad`` or
      :func:`optax_stability.flax.microbatch_gradients`.

    Raises:
      ValueError: ``weight`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_stability.flax import penalize_gradient_norm
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> penalized = penalize_gradient_norm(loss_fn, 0.1)
      >>> loss, grads = nnx.value_and_grad(penalized)(model, jnp.ones((8, 2)))
      >>> print(bool(loss > loss_fn(model, jnp.ones((8, 2)))), grads["kernel"].shape)
      True (2, 1)
    """

    def penalized(model: Module, *args: P.args, **kwargs: P.kwargs) -> Any:
        graphdef, params, others = nnx.split(model, wrt, ...)
        params, others = _tree.pure((params, others))

        def pure_loss(params):
            copy = nnx.merge(graphdef, params, others)
            value: Any = loss_fn(copy, *args, **kwargs)
            loss, aux = value if has_aux else (value, None)
            return loss, (aux, _tree.pure(nnx.split(copy, wrt, ...)[2]))

        total, (aux, written) = _penalty.penalize_gradient_norm(
            pure_loss, weight, has_aux=True
        )(params)
        nnx.update(model, written)
        return (total, aux) if has_aux else total

    return penalized
