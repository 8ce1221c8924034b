"""Microbatch gradients of NNX modules.

*Problem*: a module contains more than parameters: random streams must be split, and
running statistics merged.

*Where* and *cost*: as for :func:`optax_stability.microbatch_gradients`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from optax_stability._core import _tree
from optax_stability._moments import _microbatching
from optax_stability._moments._microbatching import Batch, Value, ValueAndGrad

Module = TypeVar("Module", bound=nnx.Module)


def _fork_streams(streams: Any, number: int) -> tuple[Any, Any]:
    """Splits each random stream into ``number`` streams, and advances it by one key.

    The same as ``nnx.split_rngs``, for states, in both graph and tree mode.
    """
    forks, advanced = {}, {}
    flat = dict(nnx.to_flat_state(streams))
    for path, count in flat.items():
        *stream, last = path
        if last == "count":
            key = jax.random.fold_in(flat[*stream, "key"], count)
            forks[*stream, "key"] = jax.random.split(key, number)
            forks[path] = jnp.zeros((number,), count.dtype)
            advanced[path] = count + 1
    return nnx.from_flat_state(forks), nnx.from_flat_state(advanced)


def _assigned_values(before: Any, after: Any) -> list:
    """The new value of each leaf, or None if nothing was assigned to it."""
    old, old_structure = jax.tree.flatten(before)
    new, new_structure = jax.tree.flatten(_tree.pure(after))
    if old_structure != new_structure:
        raise ValueError(
            "loss_fn added variables to the model or removed some, so that the "
            "microbatches cannot be merged; return such values as aux, has_aux=True."
        )
    # A variable that was not assigned still holds the same array object.
    return [b if b is not a else None for a, b in zip(old, new, strict=True)]


def _mean_of_finite(values):
    """Mean along axis 0 over the finite entries; ``values[0]`` if there is none."""
    finite = jnp.isfinite(values)
    total = jnp.sum(jnp.where(finite, values, 0), axis=0)
    count = jnp.sum(finite, axis=0, dtype=total.dtype)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), values[0])


def _merge_versions(values):
    """Merges the K versions of one variable."""
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    return _mean_of_finite(values).astype(values.dtype) if is_float else values[0]


def microbatch_gradients(
    loss_fn: Callable[[Module, Batch], Value],
    num_microbatches: int,
    *,
    wrt: Any = nnx.Param,
    vmap_size: int | None = None,
    has_aux: bool = False,
    weight_fn: Callable[[Batch], Any] | None = None,
    mean_square: bool = False,
    l1: bool = False,
    reject_nonfinite: bool = True,
    spmd_axis_name: Any = None,
) -> ValueAndGrad[Module, Batch, Value, nnx.State[Any, Any]]:
    """:func:`optax_stability.microbatch_gradients` for an NNX module.

    Replaces ``nnx.value_and_grad(loss_fn)(model, batch)``.

    **Rule**: that of the functional version, with respect to the variables that ``wrt``
    selects. Every microbatch starts from the current model, with its own random keys,
    as from ``nnx.split_rngs``. Other variables that ``loss_fn`` writes are merged:
    floats, such as the running statistics of BatchNorm, by their mean over the
    microbatches where they are finite; all others are taken from the first microbatch.

    **Guarantees**: those of the functional version; the model keeps its structure, and
    its random streams advance by one key.

    Args:
      loss_fn: ``loss_fn(model, microbatch) -> loss``, or ``(loss, aux)``.
      num_microbatches: K, divides axis 0 of every array in the batch.
      wrt: filter that selects the variables of the gradient, as in ``nnx.Optimizer``.
      vmap_size: how many microbatches are evaluated together; None: all.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      weight_fn: from a microbatch to its weight, by default its number of rows.
      mean_square: keep the mean square as well, for
        ``scale_by_safe_adam(second_moment="microbatch")``.
      l1: keep what ``estimate_noise_scale(norm="l1")`` needs as well.
      reject_nonfinite: False keeps every microbatch, even a non-finite one.
      spmd_axis_name: mesh axis that shards the batch; this and the five arguments
        before it as in :func:`optax_stability.microbatch_gradients`.

    Returns:
      ``fn(model, batch, *, loss_scale=None) -> (value, grads, moments)``; grads are an
      ``nnx.State`` for ``optimizer.update(model, grads, moments=moments)``.

    Raises:
      ValueError: ``loss_fn`` adds or removes variables; and as the functional version.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_stability.flax import microbatch_gradients
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> fn = microbatch_gradients(loss_fn, num_microbatches=4)
      >>> loss, grads, moments = fn(model, jnp.ones((8, 2)))
      >>> print(grads["kernel"].shape, moments.num_microbatches)
      (2, 1) 4
    """
    _microbatching.check_settings(
        loss_fn,
        num_microbatches,
        vmap_size,
        weight_fn,
        spmd_axis_name,
        has_aux=has_aux,
        mean_square=mean_square,
        l1=l1,
        reject_nonfinite=reject_nonfinite,
    )
    weigh = _microbatching.count_examples if weight_fn is None else weight_fn

    def fn(model, batch, *, loss_scale=None) -> Any:
        _microbatching.check_batch(batch, num_microbatches)
        graphdef, params, streams, others = nnx.split(model, wrt, nnx.RngState, ...)
        # Values only: the variables themselves belong to the model.
        streams, others = _tree.pure((streams, others))
        keys, advanced = _fork_streams(streams, num_microbatches)

        def pure_loss(params, part):
            keys, microbatch = part
            keys = jax.tree.map(lambda leaf: leaf[0], keys)
            copy = nnx.merge(graphdef, params, keys, others)
            value: Any = loss_fn(copy, microbatch)
            loss, aux = value if has_aux else (value, None)
            written = nnx.split(copy, wrt, nnx.RngState, ...)[3]
            return loss, (aux, _assigned_values(others, written))

        (loss, (aux, written)), grads, moments = _microbatching.microbatch_gradients(
            pure_loss,
            num_microbatches,
            vmap_size=vmap_size,
            has_aux=True,
            weight_fn=lambda part: weigh(part[1]),
            mean_square=mean_square,
            l1=l1,
            reject_nonfinite=reject_nonfinite,
            spmd_axis_name=spmd_axis_name,
        )(params, (keys, batch), loss_scale=loss_scale)

        values, structure = jax.tree.flatten(others)
        merged = [
            old if new is None else _merge_versions(new)
            for old, new in zip(values, written, strict=True)
        ]
        nnx.update(model, advanced, jax.tree.unflatten(structure, merged))
        return (loss, aux) if has_aux else loss, grads, moments

    return fn
