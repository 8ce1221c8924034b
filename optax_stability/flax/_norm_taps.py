"""The norm of every example's gradient, from the ordinary backward pass.

*Problem*: the noise scale is measured best with one microbatch per example, but the
gradients of single examples cost B times the memory.

*Where*: in place of ``nnx.value_and_grad``, inside the jitted step, with the modules of
:mod:`optax_stability.flax` in the model.

*Cost*: one forward and one backward pass, and the cost of the taps (see
``_gradients/_norm_taps.py``), negligible with ``only=(LayerNorm, RMSNorm)``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_stability._core import _norms, _numerics, _tree
from optax_stability._moments import _microbatching, _moments
from optax_stability._moments._microbatching import Batch, Value
from optax_stability._moments._moments import Moments
from optax_stability.flax._microbatching import Module
from optax_stability.flax._tapped_modules import DROP_INS, NormTap, record_uses

# Relative tolerance: two sums of squares over the same gradient, rounded in different
# orders, differ by less.
_ROUNDING = 1e-4


def _tap_path(path: tuple) -> tuple:
    """The path of the tap that belongs to the parameter at ``path``."""
    return *path[:-1], f"{path[-1]}_tap"


def _leaf_paths(state: Any) -> list[tuple]:
    """The paths of a state's leaves, in ``jax.tree.leaves`` order."""
    leaves, structure = jax.tree.flatten(_tree.pure(state))
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    paths = {number: path for path, number in nnx.to_flat_state(numbered)}
    return [paths[number] for number in range(len(leaves))]


def _attach_taps(model: Any, params: Any, only: tuple, rows: int) -> None:
    """Attaches a tap to every parameter that supports one."""
    modules = dict(nnx.iter_modules(model))
    attached = False
    for path, name in zip(_leaf_paths(params), _tree.leaf_names(params), strict=True):
        module, attribute = modules.get(path[:-1]), path[-1]
        if not (isinstance(module, DROP_INS) and isinstance(module, only)):
            continue
        # A subclass may have parameters of its own.
        if attribute in module.tapped:
            parameter = getattr(module, attribute)[...]
            if _numerics.is_complex(parameter):
                raise TypeError(
                    f"{name} is {parameter.dtype}: norm taps are for real parameters. "
                    "Leave its module out with only=, or use microbatch_gradients, "
                    "which supports complex parameters."
                )
            layers = parameter.shape[: parameter.ndim - module.tapped[attribute]]
            zeros = jnp.zeros((*layers, rows + 2), _numerics.real_dtype(parameter))
            tap = NormTap(zeros, parameter=name)
            setattr(module, f"{attribute}_tap", tap)
            attached = True
    if not attached:
        raise ValueError(
            "the model has no module that supports norm taps, of the types "
            f"only={[kind.__name__ for kind in only]}; use Linear, Embed, LayerNorm "
            "and RMSNorm of optax_stability.flax instead of those of nnx."
        )


def _example_weights(weight_fn: Callable[[Any], Any] | None, batch: Any, rows: int):
    """The weights of the examples, float32[B]; 0 for unusable weights."""
    if weight_fn is None:
        return jnp.ones((rows,), jnp.float32)
    weights = jnp.asarray(weight_fn(batch), jnp.float32)
    if weights.shape != (rows,):
        raise ValueError(
            f"weight_fn returned an array of shape {weights.shape}; it must return one "
            f"weight for each of the {rows} examples."
        )
    return jnp.where(_moments.usable_weight(weights), weights, 0)


def _reduce_layers(tap):
    """Reduces a tap over stacked layers: sums, but the largest number of uses."""
    if tap.ndim == 1:
        return tap
    layers = tap.reshape(-1, tap.shape[-1])
    return jnp.sum(layers, axis=0).at[-2].set(jnp.max(layers[:, -2]))


def _deviations(seen, norms, weights):
    """Σ n_b‖m_b − ḡ‖² of each leaf, float32[n_leaves]; −1 where it is unknown.

    Args:
      seen: float32[n_leaves, B + 2] – cotangents of the taps: squared norms of the
        parts n_b·m_b/N of ḡ, number of uses, and squared norm of the gradient.
      norms: float32[n_leaves] – ‖ḡ‖.
      weights: float32[B] – n_b.
    """
    squares, uses, grad_sq = seen[:, :-2], seen[:, -2], seen[:, -1]
    total, valid = jnp.sum(weights), weights > 0
    factors = jnp.where(valid, total / jnp.where(valid, weights, 1), 0)
    sums = jnp.sum(jnp.where(valid[None], factors[None] * squares, 0), axis=1)
    expected = jnp.square(norms)
    deviations = jnp.maximum(total * (sums - expected), 0)
    complete = (uses <= 1) & (jnp.abs(grad_sq - expected) <= _ROUNDING * expected)
    return jnp.where(complete, deviations, -1.0)


def _make_moments(grads: Any, taps: Any, weights: Any) -> Moments:
    norms = _norms.leaf_norms(grads)
    seen = dict(nnx.to_flat_state(_tree.pure(taps)))
    # With two uses no tap is complete: the deviation is unknown.
    untapped = jnp.zeros((len(weights) + 2,)).at[-2].set(2)
    paths = [_tap_path(path) for path in _leaf_paths(grads)]
    rows = [_reduce_layers(seen.get(path, untapped)) for path in paths]
    return Moments(
        num_microbatches=jnp.sum(weights > 0, dtype=jnp.int32),
        weight=jnp.sum(weights),
        deviation=_deviations(jnp.stack(rows), norms, weights),
        mean_square=None,
        norm=norms,
        leaves=_tree.mark_leaves(grads),
    )


def _check_same_variables(before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "loss_fn added variables to the model or removed some, which norm taps do "
            "not support; return such values as aux, with has_aux=True."
        )


def per_example_gradients(
    loss_fn: Callable[[Module, Batch], Value],
    *,
    wrt: Any = nnx.Param,
    only: tuple[type, ...] | None = None,
    has_aux: bool = False,
    weight_fn: Callable[[Batch], Any] | None = None,
) -> Callable[[Module, Batch], tuple[Value, nnx.State[Any, Any], Moments]]:
    """``nnx.value_and_grad``, with the moments of the per-example gradients.

    Replaces ``nnx.value_and_grad(loss_fn)(model, batch)``, in one backward pass, for
    models made of :class:`Linear`, :class:`Embed`, :class:`LayerNorm` and
    :class:`RMSNorm` of this package, which otherwise behave like those of ``nnx``.

    **Rule**, for examples b of weight n_b and the loss Σn_b·l_b/N::

      N = Σn_b    m_b = ∇l_b    grads = ḡ = Σn_b·m_b/N
      deviation = Σn_b‖m_b − ḡ‖² = N·(Σ N/n_b·‖n_b·m_b/N‖² − ‖ḡ‖²)

    The norms come from taps (``_gradients/_norm_taps.py``), which measure n_b·m_b/N.

    **Guarantees**

    * Value, gradient and other variables that ``loss_fn`` writes are those of
      ``nnx.value_and_grad``, up to rounding; the model keeps its structure.
    * Moments are those of ``microbatch_gradients`` with one example per microbatch,
      without ``mean_square``, up to rounding.
    * An unknown deviation is −1, never a wrong number: for a parameter without a tap,
      or with a tap that misses a part of its gradient, such as a parameter that is used
      a second time or in a penalty.

    **Edge cases**

    * The deviation is a difference with a rounding error of 2⁻²⁴·‖ḡ‖²·N, and at least
      0. The error matters only for a noise scale of a small fraction of one example,
      which nobody needs. No per-example gradient exists whose distance to the mean
      could be measured.
    * Parts n_b·m_b/N with a norm below 1e-19 count as 0; above 1e19 the deviation is
      unknown.
    * Calling one module twice is an error where tracing can detect it. :class:`Embed`
      may be used for a lookup and then as the output head.
    * Under ``nnx.scan`` or ``nnx.vmap`` over stacked layers, axis 0 of a parameter must
      be the layers; ``jax.checkpoint`` and ``nnx.remat`` work as usual.
    * A non-finite example makes the gradient non-finite, and the deviation unknown.
    * Examples must not interact, as they do in BatchNorm.
    * An input without an axis of examples, such as positions ``arange(length)``, is an
      error; broadcast it. The error is not detected if the input is as long as the
      batch.
    * A batch that ``jit`` shards on an Auto mesh is supported; ``shard_map`` and
      Explicit meshes are not.

    Args:
      loss_fn: ``loss_fn(model, batch) -> loss``, or ``(loss, aux)``; a mean over
        examples, or over what ``weight_fn`` counts.
      wrt: filter that selects the variables of the gradient, as in ``nnx.Optimizer``.
      only: types of modules to tap. The cost of ``(LayerNorm, RMSNorm)`` is negligible;
        the noise scale of these layers predicts that of the model, as Gray et al.
        report. None: all.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      weight_fn: from a batch to float32[B], the weight of each example, such as its
        number of tokens without padding. None: 1 for each.

    Returns:
      ``fn(model, batch) -> (value, grads, moments)``; grads are an ``nnx.State`` for
      ``optimizer.update(model, grads, moments=moments)``.

    Raises:
      ValueError: no module can be tapped; a tapped module is used twice, on an input
        without an axis of examples, or with an unsupported option; ``weight_fn``
        returns a wrong shape; ``loss_fn`` adds or removes variables.

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
      Gradient Noise Scale in Transformers", 2024, arXiv 2411.00999. Deviations: the
      examples have weights, and an embedding that is also the output head is exact.
    """
    kinds = DROP_INS if only is None else only

    def fn(model, batch) -> Any:
        _microbatching.check_batch(batch, 1)
        rows = int(_microbatching.count_examples(batch))
        weights = _example_weights(weight_fn, batch, rows)
        copy = nnx.merge(*nnx.split(model))
        _attach_taps(copy, nnx.split(copy, wrt, ...)[1], kinds, rows)
        graphdef, taps, params, others = nnx.split(copy, NormTap, wrt, ...)
        # Values only: the variables themselves belong to the copy.
        others = _tree.pure(others)

        def pure_loss(params, taps):
            merged = nnx.merge(graphdef, taps, params, others)
            with record_uses():
                value: Any = loss_fn(merged, batch)
            loss, aux = value if has_aux else (value, None)
            written = _tree.pure(nnx.split(merged, NormTap, wrt, ...)[3])
            _check_same_variables(others, written)
            return loss, (aux, written)

        (loss, (aux, written)), (grads, taps) = jax.value_and_grad(
            pure_loss, argnums=(0, 1), has_aux=True
        )(params, taps)
        nnx.update(model, written)
        moments = _make_moments(grads, taps, weights)
        return (loss, aux) if has_aux else loss, grads, moments

    return fn
