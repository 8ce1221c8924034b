"""The norm of every example's gradient, from the backward pass that is made anyway.

*Problem*: the noise scale is measured best with as many microbatches as there are
examples, and gradients of single examples cost B times the memory.

*Where*: in place of ``nnx.value_and_grad``, inside the jitted step, with the modules of
:mod:`optax_stability.flax` in the model.

*Cost*: one forward and one backward pass, and what the taps take (see
``_gradients/_norm_taps.py``); next to nothing with ``only=(LayerNorm, RMSNorm)``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_stability._core import _norms, _tree
from optax_stability._moments import _microbatching, _moments
from optax_stability._moments._microbatching import Batch, Value
from optax_stability._moments._moments import Moments
from optax_stability.flax._microbatching import Module
from optax_stability.flax._tapped_modules import DROP_INS, NormTap, one_evaluation

# Two sums of squares over the same gradient, each rounded in its own order, differ by
# less, relative to the sum.
_ROUNDING = 1e-4


def _tap_name(path: tuple) -> tuple:
    """Where the tap of the parameter at a path is."""
    return *path[:-1], f"{path[-1]}_tap"


def _paths(state: Any) -> list[tuple]:
    """The paths of a state's leaves, in ``jax.tree.leaves`` order."""
    leaves, structure = jax.tree.flatten(_tree.pure(state))
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    places = {number: path for path, number in nnx.to_flat_state(numbered)}
    return [places[number] for number in range(len(leaves))]


def _attach(model: Any, params: Any, only: tuple, rows: int) -> None:
    """Gives a tap to every parameter that can have one."""
    modules = dict(nnx.iter_modules(model))
    attached = False
    for path, name in zip(_paths(params), _tree.leaf_names(params), strict=True):
        module, attribute = modules.get(path[:-1]), path[-1]
        if not (isinstance(module, DROP_INS) and isinstance(module, only)):
            continue
        # A subclass may have parameters of its own.
        if attribute in module.tapped:
            shape = getattr(module, attribute).shape
            layers = shape[: len(shape) - module.tapped[attribute]]
            tap = NormTap(jnp.zeros((*layers, rows + 2)), parameter=name)
            setattr(module, f"{attribute}_tap", tap)
            attached = True
    if not attached:
        raise ValueError(
            "the model has no module that could have norm taps, of the types "
            f"only={[kind.__name__ for kind in only]}; use Linear, Embed, LayerNorm "
            "and RMSNorm of optax_stability.flax in place of those of nnx."
        )


def _weights(weight_fn: Callable[[Any], Any] | None, batch: Any, rows: int):
    """The weights of the examples, float32[B]; 0 for those that do not count."""
    if weight_fn is None:
        return jnp.ones((rows,), jnp.float32)
    weights = jnp.asarray(weight_fn(batch), jnp.float32)
    if weights.shape != (rows,):
        raise ValueError(
            f"weight_fn returned the shape {weights.shape}; it has to return one "
            f"weight for each of the {rows} examples."
        )
    return jnp.where(_moments.usable_weight(weights), weights, 0)


def _over_layers(tap):
    """The row of a parameter of stacked layers: sums, and the largest count."""
    if tap.ndim == 1:
        return tap
    layers = tap.reshape(-1, tap.shape[-1])
    return jnp.sum(layers, axis=0).at[-2].set(jnp.max(layers[:, -2]))


def _deviations(seen, norms, weights):
    """Σ n_b‖m_b − ḡ‖² of each leaf, float32[n_leaves]; NaN where it is not known.

    Args:
      seen: float32[n_leaves, B + 2] – squares of the examples' parts n_b·m_b/N of ḡ,
        number of uses and the square of the gradient of what the taps belong to.
      norms: float32[n_leaves] – ‖ḡ‖.
      weights: float32[B] – n_b.
    """
    squares, uses, square = seen[:, :-2], seen[:, -2], seen[:, -1]
    total, counts = jnp.sum(weights), weights > 0
    factors = jnp.where(counts, total / jnp.where(counts, weights, 1), 0)
    sums = jnp.sum(jnp.where(counts, factors * squares, 0), axis=1)
    expected = jnp.square(norms)
    deviations = jnp.maximum(total * (sums - expected), 0)
    is_all = (uses <= 1) & (jnp.abs(square - expected) <= _ROUNDING * expected)
    return jnp.where(is_all, deviations, jnp.nan)


def _make_moments(grads: Any, taps: Any, weights: Any) -> Moments:
    norms = _norms.leaf_norms(grads)
    seen = dict(nnx.to_flat_state(_tree.pure(taps)))
    unseen = jnp.full((len(weights) + 2,), jnp.nan)
    rows = [_over_layers(seen.get(_tap_name(path), unseen)) for path in _paths(grads)]
    return Moments(
        num_microbatches=jnp.sum(weights > 0, dtype=jnp.int32),
        weight=jnp.sum(weights),
        deviation=_deviations(jnp.stack(rows), norms, weights),
        mean_square=None,
        norm=norms,
        leaves=_tree.mark_leaves(grads),
    )


def _same_variables(before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "loss_fn added variables to the model or removed some, which the taps are "
            "in the way of. Return such values, with has_aux=True."
        )


def per_example_gradients(
    loss_fn: Callable[[Module, Batch], Value],
    *,
    wrt: Any = nnx.Param,
    only: tuple[type, ...] | None = None,
    has_aux: bool = False,
    weight_fn: Callable[[Batch], Any] | None = None,
) -> Callable[[Module, Batch], tuple[Value, nnx.State, Moments]]:
    """``nnx.value_and_grad``, with the moments of every example's gradient.

    In place of ``nnx.value_and_grad(loss_fn)(model, batch)``, in one backward pass, for
    models made of :class:`Linear`, :class:`Embed`, :class:`LayerNorm` and
    :class:`RMSNorm` of this package, which are those of ``nnx`` otherwise.

    **Rule**, for examples b of weight n_b and the loss Σn_b·l_b/N::

      N = Σn_b    m_b = ∇l_b    grads = ḡ = Σn_b·m_b/N
      deviation = Σn_b‖m_b − ḡ‖² = N·(Σ N/n_b·‖n_b·m_b/N‖² − ‖ḡ‖²)

    The norms come from taps (``_gradients/_norm_taps.py``), which see n_b·m_b/N.

    **Guarantees**

    * Value and gradient are those of ``nnx.value_and_grad``, to rounding, and so is
      what ``loss_fn`` writes to other variables; the model keeps its structure.
    * Moments are those of ``microbatch_gradients`` with one example per microbatch,
      without ``mean_square``, to rounding.
    * A deviation that is not known is NaN, never a wrong number: of a parameter
      without tap, or one whose taps have not seen all of its gradient, such as one that
      is used a second time or in a penalty.

    **Edge cases**

    * The deviation is a difference: 2⁻²⁴·‖ḡ‖²·N of it is rounding. That matters where
      the noise scale is a small fraction of one example, where nobody needs it; it ends
      at 0. No per-example gradient exists whose distance to the mean could be taken.
    * Parts n_b·m_b/N of a norm below 1e-19 count as 0; above 1e19 nothing is known.
    * One module called twice is an error where that can be told while tracing.
      :class:`Embed` may be looked up in and then be the output head.
    * Under ``nnx.scan`` or ``nnx.vmap`` over stacked layers the layers of a parameter
      are axis 0; ``jax.checkpoint`` and ``nnx.remat`` work as usual.
    * An example that is not finite makes the gradient so, and the deviation NaN.
    * Examples must not see each other, as they do in BatchNorm.
    * What has no axis of examples, such as positions ``arange(length)``, is an error,
      which is not noticed if it happens to be as long as the batch. Broadcast it.
    * A batch that ``jit`` shards on an Auto mesh is fine; ``shard_map`` and Explicit
      meshes are not supported.

    Args:
      loss_fn: ``loss_fn(model, batch) -> loss``, or ``(loss, aux)``; a mean over
        examples, or over what ``weight_fn`` counts.
      wrt: filter of the variables to differentiate by, as in ``nnx.Optimizer``.
      only: types of modules to tap. ``(LayerNorm, RMSNorm)`` costs next to nothing; the
        noise scale of these layers predicts that of the model, as Gray et al. report.
        None: all.
      has_aux: whether ``loss_fn`` returns something beside the loss.
      weight_fn: from a batch to float32[B], the weight of each example, such as its
        number of tokens that are no padding. None: 1 for each.

    Returns:
      ``fn(model, batch) -> (value, grads, moments)``; grads are an ``nnx.State`` for
      ``optimizer.update(model, grads, moments=moments)``.

    Raises:
      ValueError: nothing can be tapped; a tapped module is used twice, on something
        without axis of examples or with an option that is not supported; ``weight_fn``
        returns another shape; ``loss_fn`` adds or removes variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_stability.flax import Linear, per_example_gradients
      >>> model = Linear(2, 1, rngs=nnx.Rngs(0))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> loss, grads, moments = per_example_gradients(loss_fn)(model, jnp.ones((8, 2)))
      >>> print(grads["kernel"].shape, moments.num_microbatches, moments.weight)
      (2, 1) 8 8.0

    References:
      Gray et al., "Normalization Layer Per-Example Gradients are Sufficient to Predict
      Gradient Noise Scale in Transformers", 2024, arXiv 2411.00999. Unlike there, the
      examples have weights, and an embedding that is looked up in and is the output
      head is exact.
    """
    kinds = DROP_INS if only is None else only

    def fn(model, batch) -> Any:
        _microbatching.check_batch(batch, 1)
        rows = int(_microbatching.count_examples(batch))
        weights = _weights(weight_fn, batch, rows)
        copy = nnx.merge(*nnx.split(model))
        _attach(copy, nnx.split(copy, wrt, ...)[1], kinds, rows)
        graphdef, taps, params, others = nnx.split(copy, NormTap, wrt, ...)
        # Values only: the variables themselves belong to the copy.
        others = _tree.pure(others)

        def pure_loss(params, taps):
            merged = nnx.merge(graphdef, taps, params, others)
            with one_evaluation():
                value: Any = loss_fn(merged, batch)
            loss, aux = value if has_aux else (value, None)
            written = _tree.pure(nnx.split(merged, NormTap, wrt, ...)[3])
            _same_variables(others, written)
            return loss, (aux, written)

        (loss, (aux, written)), (grads, taps) = jax.value_and_grad(
            pure_loss, argnums=(0, 1), has_aux=True
        )(params, taps)
        nnx.update(model, written)
        moments = _make_moments(grads, taps, weights)
        return (loss, aux) if has_aux else loss, grads, moments

    return fn
