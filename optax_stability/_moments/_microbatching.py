"""The gradient of a batch from microbatches, with statistics of its noise.

*Problem*: a large batch does not fit into memory; its gradient does not show how much
the microbatches differ; and one NaN in one sequence costs the whole step.

*Where*: in place of ``jax.value_and_grad``, inside the jitted step.

*Cost*: a ``lax.scan`` or ``jax.vmap`` over the microbatches, and one reduction over
each microbatch gradient. Memory: the gradients of the ``vmap_size`` microbatches that
are evaluated together and one accumulator; with ``mean_square`` one more accumulator. A
loss scale adds a multiplication wherever a microbatch gradient is read, and no memory.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_stability._core import _norms, _numerics, _tree, _validate
from optax_stability._core._mesh_axes import (
    all_varying_axes,
    sharding_axes,
    typed_like,
    varying_axes,
)
from optax_stability._moments import _moments
from optax_stability._moments._differentiable import split_static
from optax_stability._moments._moments import Aggregate, Moments

Params = TypeVar("Params")
Batch = TypeVar("Batch")
Value = TypeVar("Value")
Params_contra = TypeVar("Params_contra", contravariant=True)
Batch_contra = TypeVar("Batch_contra", contravariant=True)
Value_co = TypeVar("Value_co", covariant=True)
Grads_co = TypeVar("Grads_co", covariant=True)


class ValueAndGrad(Protocol[Params_contra, Batch_contra, Value_co, Grads_co]):
    """The function that :func:`microbatch_gradients` returns, with its types.

    Maps parameters (or a module) and a batch to the value, the gradient and its
    :class:`Moments`.
    """

    def __call__(
        self,
        params: Params_contra,
        batch: Batch_contra,
        /,
        *,
        loss_scale: float | jax.Array | None = None,
    ) -> tuple[Value_co, Grads_co, Moments]:
        """Evaluates one batch."""
        ...


def check_settings(
    loss_fn: Any,
    num_microbatches: int,
    vmap_size: int | None,
    weight_fn: Any,
    spmd_axis_name: Any,
    **flags: Any,
) -> None:
    """Raises unless every setting is of its kind, and ``vmap_size`` divides K."""
    _validate.check_callable("loss_fn", loss_fn)
    if weight_fn is not None:
        _validate.check_callable("weight_fn", weight_fn)
    _validate.check_flags(**flags)
    _validate.check_axis_name("spmd_axis_name", spmd_axis_name)
    _validate.check_size("num_microbatches", num_microbatches, 1)
    if vmap_size is None:
        return
    _validate.check_size("vmap_size", vmap_size, 1)
    if num_microbatches % vmap_size:
        raise ValueError(
            f"vmap_size={vmap_size} does not divide num_microbatches="
            f"{num_microbatches}; give a divisor, or None for all at once."
        )


def check_batch(batch: Any, num_microbatches: int) -> None:
    """Raises unless every array of the batch can be cut into equal parts."""
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(
            f"batch={batch!r} holds no array; give arrays with examples along axis 0."
        )
    for name, leaf in zip(_tree.leaf_names(batch), leaves, strict=True):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUS":
            raise TypeError(
                f"batch: {name!r} is a NumPy array of {leaf.dtype}; give arrays of "
                "numbers, and keep texts and objects out of the step."
            )
        shape = jnp.shape(leaf)
        if shape and shape[0] == 0:
            raise ValueError(
                f"batch: {name!r}, of shape {shape}, has no examples; leave empty "
                "batches out, such as the last one of a data set."
            )
        if not shape or shape[0] % num_microbatches:
            raise ValueError(
                f"batch: axis 0 of {name!r}, of shape {shape}, is not a multiple of "
                f"num_microbatches={num_microbatches}; change one of them."
            )


def _cut(leaf, sizes: tuple[int, int, int]):
    """Splits axis 0 into three axes; the first of them keeps the sharding."""
    shape = (*sizes, *leaf.shape[1:])
    sharding = jax.typeof(leaf).sharding
    if all(axis is None for axis in sharding.spec):
        return leaf.reshape(shape)
    spec = PartitionSpec(sharding.spec[0], None, None, *sharding.spec[1:])
    return leaf.reshape(shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _split(batch: Any, groups: int, vmap_size: int, *, across_devices: bool) -> Any:
    """Splits axis 0 into [groups, vmap_size, examples]; rows stay on their device."""

    def split(leaf):
        leaf = jnp.asarray(leaf)
        examples = leaf.shape[0] // (groups * vmap_size)
        if across_devices:
            # Each device forms whole microbatches from its own rows.
            return jnp.moveaxis(_cut(leaf, (vmap_size, groups, examples)), 0, 1)
        return jnp.moveaxis(_cut(leaf, (examples, groups, vmap_size)), 0, 2)

    return jax.tree.map(split, batch)


def count_examples(microbatch: Any) -> float:
    """The largest length of axis 0: arrays of random keys may be shorter."""
    return float(max(leaf.shape[0] for leaf in jax.tree.leaves(microbatch)))


def _not_constant(zeros: Any) -> Any:
    """The same zeros, but XLA does not know their value.

    They are written to a buffer, the carry of a loop. XLA would read that buffer
    wherever else it needs zeros of such a shape, where a constant costs nothing.
    """
    leaves, treedef = jax.tree.flatten(zeros)
    # One number per leaf, or leaves of one shape would be copies of one buffer.
    hidden = lax.optimization_barrier(jnp.zeros((len(leaves),), jnp.float32))
    shown = [
        leaf + x.astype(leaf.dtype) for leaf, x in zip(leaves, hidden, strict=True)
    ]
    return jax.tree.unflatten(treedef, shown)


def _usable_scale(loss_scale: Any) -> Any:
    """The loss scale as float32[], clipped so that its reciprocal is normal."""
    if loss_scale is None:
        return None
    remedy = "give a power of two such as 2.0**15, or None"
    _validate.check_interval("loss_scale", loss_scale, "(0, inf)", remedy)
    return jnp.clip(jnp.asarray(loss_scale, jnp.float32), 2.0**-126, 2.0**126)


def _check_loss(loss: Any, params: Any) -> None:
    """Raises if JAX has summed the gradients of devices whose losses differ."""
    names, leaves = _tree.leaf_names(params), jax.tree.leaves(params)
    for name, leaf in zip(names, leaves, strict=True):
        summed = varying_axes(jax.typeof(loss)) - varying_axes(jax.typeof(leaf))
        if summed:
            axes = ", ".join(map(repr, sorted(summed)))
            raise ValueError(
                f"under shard_map the loss differs along the mesh axis {axes}, while "
                f"params[{name!r}] does not: JAX then sums the gradients over the "
                "devices, and the noise between devices is lost. Return "
                f"jax.lax.pmean(loss, {axes}) from loss_fn; or use jit instead of "
                f"shard_map, with spmd_axis_name={axes}, which gives every device its "
                "own microbatches."
            )


def _checked_loss(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """``loss_fn``, which raises TypeError unless it returns what ``has_aux`` says."""

    def checked(params, microbatch):
        value = loss_fn(params, microbatch)
        is_pair = isinstance(value, tuple) and len(value) == 2
        if has_aux and not is_pair:
            raise TypeError(
                f"has_aux=True, but loss_fn returned a {type(value).__name__}; return "
                "(loss, aux), or leave has_aux out."
            )
        loss = value[0] if has_aux else value
        if isinstance(loss, tuple):
            raise TypeError(
                "loss_fn returned a tuple; if it is (loss, aux), give has_aux=True."
            )
        if jnp.shape(loss) != ():
            raise TypeError(
                f"loss_fn must return one number, got the shape {jnp.shape(loss)}; "
                "return the mean over the examples."
            )
        return value

    return checked


def _value_and_grad(loss_fn: Callable[..., Any], has_aux: bool, loss_scale: Any):
    """``jax.value_and_grad`` with the loss scale in the backward pass only."""
    if loss_scale is None:
        return jax.value_and_grad(loss_fn, has_aux=has_aux)

    def scaled(params, microbatch):
        value = loss_fn(params, microbatch)
        loss = value[0] if has_aux else value
        wide = _numerics.promote(loss.dtype, loss_scale.dtype)
        return loss_scale.astype(wide) * loss.astype(wide), value

    def value_and_grad(params, microbatch):
        grads, value = jax.grad(scaled, has_aux=True)(params, microbatch)
        # XLA fuses a multiplication into the operations that read the gradient.
        inverse = 1 / loss_scale
        return value, jax.tree.map(
            lambda g: _numerics.times(g, inverse.astype(_numerics.real_dtype(g))),
            _moments.widen(grads),
        )

    return value_and_grad


def microbatch_gradients(
    loss_fn: Callable[[Params, Batch], Value],
    num_microbatches: int,
    *,
    vmap_size: int | None = None,
    has_aux: bool = False,
    weight_fn: Callable[[Batch], Any] | None = None,
    mean_square: bool = False,
    l1: bool = False,
    reject_nonfinite: bool = True,
    spmd_axis_name: Any = None,
) -> ValueAndGrad[Params, Batch, Value, Params]:
    """``jax.value_and_grad`` over K microbatches, with their :class:`Moments`.

    **Rule**, for K equal parts of the batch, the microbatches, with losses lₖ,
    gradients mₖ and weights nₖ; the sums are over the kept microbatches::

      N = Σnₖ    loss = Σnₖ·lₖ/N    grads = ḡ = Σnₖ·mₖ/N
      deviation = Σnₖ‖mₖ − ḡ‖²      mean_square = Σnₖ·|mₖ|²/N

      kept  if every entry of mₖ and lₖ are finite, and 0 < nₖ < ∞

    **Guarantees**

    * If ``loss_fn`` is a mean over examples, or over the units that ``weight_fn``
      counts, loss and gradient are those of the whole batch for every K and
      ``vmap_size``, except for rounding: in float32 the error is at most 2⁻²⁰ times the
      largest |mₖ|, for K up to 64.
    * A microbatch that is not finite changes only K and N.
    * Sums are formed in float32 at least; the gradient has the dtype of the parameters.
    * With ``loss_scale=S`` only the backward pass sees S. Loss, gradient and moments
      are those without S; for a power of two they are the same bit for bit, wherever
      nothing overflows or underflows. Each mₖ is divided by S in float32 at least,
      before it is checked, summed or rounded. So an overflow costs only its microbatch.
    * Rows stay on the device that holds them, under Auto and Explicit meshes.

    **Edge cases**

    * If no microbatch is kept, the loss is NaN and the gradient is 0: ``skip_spikes``
      then skips the step.
    * A leaf whose norm is above 8e37 (4e307 in float64), or a weight above 8e37, counts
      as not finite.
    * Complex parameters count by their modulus. Their gradient is that of
      ``jax.grad``, which is conjugated before it is subtracted: see ``jax.grad``.
    * The loss scale is clipped to 2⁻¹²⁶ … 2¹²⁶; if it is NaN, no microbatch is kept.
      Average the loss in float32: the backward pass of a float16 mean starts with S in
      float16, whose maximum is 65504.
    * Microbatch k has the rows k, k + K, k + 2K …; with ``spmd_axis_name`` its rows are
      adjacent.
    * The arrays of a batch may differ in length, as long as K divides each length.
      Randomness such as dropout needs a key per microbatch: put
      ``jax.random.split(key, K)`` into the batch, and use ``batch["key"][0]`` in the
      loss.
    * Layers that use batch statistics, such as BatchNorm, see the microbatch: neither
      splitting nor accumulating makes their batch larger.
    * Clipping each microbatch differs from clipping their mean. A clip in the optimizer
      chain clips the mean.
    * ``jax.checkpoint`` inside ``loss_fn`` works as usual.
    * Leaves of ``params`` that are not arrays of floats or complex numbers (functions,
      strings, Python numbers, integers, keys) reach ``loss_fn`` as they are, and have
      None in the gradient: so a module of Equinox can be given as it is, as to
      ``eqx.filter_value_and_grad``.

    Args:
      loss_fn: ``loss_fn(params, microbatch) -> loss``, a float scalar; with ``has_aux``
        ``(loss, aux)``.
      num_microbatches: K ≥ 1; divides axis 0 of every array in the batch.
      vmap_size: how many microbatches are evaluated together, a divisor of K. None: all
        (one ``jax.vmap``, K gradients in memory); 1: one after the other
        (``lax.scan``, two gradients in memory).
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      weight_fn: maps a microbatch to its weight nₖ, such as its number of tokens
        without padding; the unit of the noise scale. None: its number of rows.
      mean_square: also keep Σnₖ·mₖ², for
        ``scale_by_safe_adam(second_moment="microbatch")``; costs one buffer.
      l1: also keep :class:`SignMoments`, for ``estimate_noise_scale(norm="l1")``; costs
        two reductions over each microbatch gradient and two numbers per leaf, and with
        a ``vmap_size`` above 1, on a CPU, a temporary array like the gradients that are
        evaluated together. One by one, each microbatch is compared with the earlier
        ones; together, with all others: the numbers differ, and have the same mean.
      reject_nonfinite: False keeps every microbatch, finite or not.
      spmd_axis_name: mesh axis that shards the batch; every device then gets its own
        microbatches. This measures the noise between devices, at the cost of one
        all-reduce. The size of the axis must divide ``vmap_size``. For use under
        ``jit``, not ``shard_map``.

    Under ``shard_map`` average the loss inside ``loss_fn``, with ``jax.lax.pmean`` over
    the mesh axes that shard the batch. Microbatch k then consists of the k-th
    microbatches of all devices, which keep or reject it together; the default weight
    counts the rows of one device. A loss that differs between devices is an error if
    the parameters do not differ: JAX would sum the gradients, and the measured noise
    would be 0. These rules rely on the types of ``check_vma=True``, the default.

    Returns:
      ``fn(params, batch, *, loss_scale=None) -> (value, grads, moments)``, to be called
      inside ``jit``. value is the loss, or ``(loss, aux)`` with aux stacked over the K
      microbatches, in the order of their evaluation. ``loss_scale`` is S > 0, a
      number or float32[], for half precision; see
      :func:`optax_stability.flax.update_dynamic_scale`.

    Raises:
      TypeError: a size is not an integer, or the loss scale is not a number.
      ValueError: ``vmap_size`` does not divide K, K does not divide the batch, the loss
        scale is not above 0, ``params`` holds nothing that can be differentiated, or
        devices share the parameters but not the loss.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.mean((x @ params) ** 2)
      >>> fn = microbatch_gradients(loss_fn, num_microbatches=2)
      >>> loss, grads, moments = fn(jnp.ones(2), jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      >>> print(loss, grads, moments.num_microbatches, moments.weight)
      5.0 [10.  0.] 2 2.0

    References:
      Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983,
      eq. 2.1, with weights, for the deviation.
    """
    check_settings(
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
    vmap_size = num_microbatches if vmap_size is None else vmap_size
    groups = num_microbatches // vmap_size
    weigh = count_examples if weight_fn is None else weight_fn
    checked_loss = _checked_loss(loss_fn, has_aux)

    def evaluate(join, params, microbatch, loss_scale):
        def loss_of_joined(params, microbatch):
            return checked_loss(join(params), microbatch)

        value_and_grad = _value_and_grad(loss_of_joined, has_aux, loss_scale)
        value, grads = value_and_grad(params, microbatch)
        loss, aux = value if has_aux else (value, None)
        _check_loss(loss, params)
        weight = jnp.asarray(weigh(microbatch), jnp.float32)
        if weight.shape != ():
            raise ValueError(
                f"weight_fn must return one number, got the shape {weight.shape}; "
                "return a sum, such as the number of tokens."
            )
        weight = jnp.where(_moments.usable_weight(weight), weight, 0)
        return grads, loss, weight, aux

    def kept(weight, finite):
        return jnp.where(finite, weight, 0) if reject_nonfinite else weight

    def add_one(join, total, params, microbatches, loss_scale):
        microbatch = jax.tree.map(lambda leaf: leaf[0], microbatches)
        grads, loss, weight, aux = evaluate(join, params, microbatch, loss_scale)
        axes = sharding_axes(grads, loss)
        sq_distances = (
            None if total is None else _moments.squared_distances(total, grads, axes)
        )
        finite = _moments.all_finite(
            grads, loss, sq_distances=sq_distances, axis_name=axes
        )
        weight = kept(weight, finite)
        part = _moments.single(grads, loss, weight, mean_square=mean_square, l1=l1)
        if total is not None:
            part = _moments.merge(total, part, sq_distances, axes)
        return part, jax.tree.map(lambda leaf: leaf[None], aux)

    def add_group(join, total, params, microbatches, loss_scale):
        grads, losses, weights, aux = jax.vmap(
            functools.partial(evaluate, join),
            in_axes=(None, 0, None),
            spmd_axis_name=spmd_axis_name,
        )(params, microbatches, loss_scale)
        axes = sharding_axes(grads, losses)
        weights = kept(weights, _moments.each_finite(grads, losses, axes))
        part = _moments.stacked(
            grads, losses, weights, mean_square=mean_square, l1=l1, axis_name=axes
        )
        if total is None:
            return part, aux
        sq_distances = _moments.squared_distances(total, part.mean, axes)
        return _moments.merge(total, part, sq_distances, axes), aux

    def evaluate_all(join, params, batch, loss_scale) -> tuple[Aggregate, Any]:
        add = functools.partial(add_one if vmap_size == 1 else add_group, join)
        if groups == 1:
            group = jax.tree.map(lambda leaf: leaf[0], batch)
            return add(None, params, group, loss_scale)
        empty = _moments.empty(params, mean_square=mean_square, l1=l1)
        empty = empty._replace(mean=_not_constant(empty.mean))
        if all_varying_axes((params, batch)):
            first = jax.tree.map(lambda leaf: leaf[0], batch)
            after_one, _ = jax.eval_shape(add, empty, params, first, loss_scale)
            empty = typed_like(empty, after_one)
        total, aux = lax.scan(
            lambda total, group: add(total, params, group, loss_scale), empty, batch
        )
        return total, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)

    def fn(params, batch, *, loss_scale=None) -> Any:
        check_batch(batch, num_microbatches)
        loss_scale = _usable_scale(loss_scale)
        parts = _split(
            batch, groups, vmap_size, across_devices=spmd_axis_name is not None
        )
        params, join = split_static(params)
        total, aux = evaluate_all(join, params, parts, loss_scale)
        grads = optax.tree.cast_like(total.mean, params)
        moments = total.moments._replace(norm=_norms.leaf_norms(grads))
        loss = jnp.where(moments.weight > 0, total.value, jnp.nan)
        return (loss, aux) if has_aux else loss, grads, moments

    return fn
