"""Gradient accumulation across calls, as a replacement for ``optax.MultiSteps``.

*Problem*: ``optax.MultiSteps`` runs the inner optimizer on every call, keeps three more
copies of the parameters, never recovers from one NaN, hands on the loss of the last
call alone (in a chain none at all), and discards the information in Σg².

*Where in the chain*: outermost, around every transformation that must see whole
batches.

*Cost*: on most calls one pass that adds the gradient to the mean; ``inner`` runs only
when a window is full. State: a float32 buffer like the parameters for the mean and,
with ``mean_square``, one for the mean square; no other memory.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from optax_stability._accumulation._state import (
    AccumulateMomentsState,
    check_state,
    init_state,
    step_if_full,
    window_of,
)
from optax_stability._core import _mesh_axes, _numerics, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._core._losses import given_losses, loss_of
from optax_stability._moments import _moments
from optax_stability._moments._moments import Aggregate, Moments


@runtime_checkable
class ChoosesMicrobatches(Protocol):
    """Chooses the length of a window from the state of the inner transformation."""

    def num_microbatches(self, inner_opt_state: Any) -> jax.Array:
        """The number of calls in the next window, int32[], ≥ 1."""
        ...


def _check_moments(moments: Moments, weight: Any, mean_square: bool, l1: bool) -> None:
    if weight is not None:
        raise ValueError(
            "weight= and moments= were both given; leave weight= out, because moments= "
            "already contains the weight."
        )
    if mean_square and moments.mean_square is None:
        raise ValueError(
            "moments.mean_square is None; compute the moments with "
            "microbatch_gradients(..., mean_square=True), or use "
            "accumulate_moments(..., mean_square=False)."
        )
    if l1 and moments.l1 is None:
        raise ValueError(
            "moments.l1 is None; compute the moments with microbatch_gradients(..., "
            "l1=True), or use accumulate_moments(..., l1=False)."
        )


def _incoming(
    updates, loss, weight, moments, *, mean_square: bool, l1: bool, axis_name
) -> Aggregate:
    """The aggregate of one call: one microbatch or, with moments, several."""
    if moments is None:
        weight = 1.0 if weight is None else weight
        _validate.check_number("weight", weight)
        return _moments.single(updates, loss, weight, mean_square=mean_square, l1=l1)
    moments = _moments.visible(moments, updates)
    _check_moments(moments, weight, mean_square, l1)
    moments = moments if mean_square else moments._replace(mean_square=None)
    moments = moments if l1 else moments._replace(l1=None)
    return Aggregate(
        mean=updates,
        value=jnp.asarray(loss, _numerics.real_dtype(updates)),
        moments=_moments.rescaled(moments, updates, axis_name),
    )


def _calls_per_step(every_k: Any, state: AccumulateMomentsState):
    """The number of calls in the current window."""
    if isinstance(every_k, ChoosesMicrobatches):
        return every_k.num_microbatches(state.inner_opt_state)
    return every_k(state.gradient_step) if callable(every_k) else every_k


def flush(
    inner: optax.GradientTransformation,
    state: Any,
    params: Any = None,
    **extra_args: Any,
) -> tuple[optax.Updates, AccumulateMomentsState]:
    """Takes the step of a window that is not full, such as the last one of an epoch.

    **Rule**: the same step as if the last microbatch had filled the window of
    :func:`accumulate_moments`; the mean is over the microbatches in the window.

    **Edge cases**: if the window is empty, the updates are 0 and the state of ``inner``
    is unchanged. The mean has the dtype of ``params``, or of the
    accumulator if they are not given.

    Args:
      inner: the transformation that ``accumulate_moments`` wraps.
      state: the state of ``accumulate_moments``; with NNX ``optimizer.opt_state``.
      params: the parameters, for an ``inner`` that needs them; with NNX
        ``nnx.state(model, nnx.Param)``.
      extra_args: passed on to ``inner``. The mean loss of the window is passed on as
        ``value=``, unless ``extra_args`` contains another ``value``.

    Returns:
      Updates and state, as plain arrays.

    Raises:
      TypeError: ``inner`` is not a transformation, or ``state`` is not an
        :class:`AccumulateMomentsState`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params, inner = {"w": jnp.ones(2)}, optax.sgd(0.1)
      >>> tx = accumulate_moments(inner, every_k=8)
      >>> _, state = tx.update({"w": jnp.array([1.0, -3.0])}, tx.init(params), params)
      >>> updates, state = flush(inner, state, params)
      >>> print(updates["w"])
      [-0.1  0.3]
    """
    _validate.check_transformation("inner", inner)
    state, params = check_state(state), _tree.pure(params)
    window = window_of(state)
    return step_if_full(
        optax.with_extra_args_support(inner),
        state,
        window,
        jnp.array(True),
        params,
        {"value": window.value, **extra_args},
        like=state.acc_grads if params is None else params,
    )


def accumulate_moments(
    inner: optax.GradientTransformation,
    every_k: int | jax.Array | optax.Schedule | ChoosesMicrobatches,
    *,
    mean_square: bool = True,
    l1: bool = False,
    reject_nonfinite: bool = True,
    accumulator_dtype: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages gradients over ``every_k`` calls, and then lets ``inner`` take a step.

    Replaces ``optax.MultiSteps`` and is called in the same way: the updates are zero
    until a window is full.

    **Rule**, for microbatch gradients mₖ with weights nₖ; the sums are over the kept
    microbatches::

      N = Σnₖ    ḡ = Σnₖ·mₖ/N    deviation = Σnₖ‖mₖ − ḡ‖²    mean_square = Σnₖ·mₖ²/N

      kept        if every entry of mₖ and the loss are finite, and 0 < nₖ < ∞
      window full after every_k(gradient_step) calls, kept or not
      then        inner.update(ḡ, moments=Moments(...), value=Σnₖ·lossₖ/N, ...)

    **Guarantees**

    * A microbatch that is not finite changes only the counters: mean, moments and loss
      are those of the other microbatches, and the window ends at the same call.
    * If no microbatch of a window is kept, the updates are 0 and the state of ``inner``
      is unchanged.
    * ``inner`` runs once per window: its schedules count gradient steps.
    * On all other calls the updates are 0 and the state of ``inner`` is unchanged, bit
      for bit.
    * A run may resume in the middle of a window with another ``every_k``. No microbatch
      is lost or moved to another window: if the window already has enough calls, the
      next call closes it.
    * The order of the microbatches does not matter, except for rounding: in float32 the
      error of ḡ is at most 2⁻²⁰ times the largest |mₖ|, for up to 64 microbatches.

    **Edge cases**

    * A leaf whose norm is above 8e37 (4e307 in float64), or a weight above 8e37, counts
      as not finite.
    * A clip or skip *inside*, ``accumulate_moments(chain(clip, adam))``, sees the whole
      batch once. A clip or skip *before* it, ``chain(clip, accumulate_moments(adam))``,
      sees every microbatch.
    * ``inner`` gets ḡ in the dtype of the gradients. Other extra arguments are those of
      the last call of the window.
    * Layers that use batch statistics, such as BatchNorm, still see single
      microbatches: accumulation does not make their batch larger.
    * Reverse mode passes: the derivative is that of the steps that are taken.

    Args:
      inner: the transformation that takes the steps: the whole chain.
      every_k: calls per step, ≥ 1; or a schedule that maps the gradient step to this
        number; or a :func:`batch_size_schedule`, which follows the noise scale.
      mean_square: also keep Σnₖ·mₖ², for
        ``scale_by_safe_adam(second_moment="microbatch")``; costs one buffer.
      l1: also keep what ``estimate_noise_scale(norm="l1")`` needs; costs two reductions
        over each gradient and two numbers per leaf.
      reject_nonfinite: False keeps every microbatch, finite or not.
      accumulator_dtype: dtype of the mean. None for that of each parameter, but at
        least float32; the mean of a complex parameter is complex with any dtype. A
        dtype narrower than float32 loses small gradients. Gradients in a narrower dtype
        than this one need a copy in this dtype while ``inner`` runs.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient: all devices
        then keep or reject together, and deviations are those of whole leaves. Leave it
        None under ``jit``.

    Returns:
      A transformation with state :class:`AccumulateMomentsState`. Its ``update`` takes
      ``weight=`` (nₖ, 1 by default), the loss as ``value=`` or ``loss=``, and
      ``moments=`` if :func:`microbatch_gradients` computed the gradient from several
      microbatches. Metrics: ``accumulate/mini_step`` (0 after a step),
      ``accumulate/num_microbatches`` (kept in the current window; after a step, kept in
      the window that ended) and ``accumulate/rejected_total``. See :func:`has_updated`
      and :func:`flush`.

    Raises:
      TypeError: ``inner`` is not a transformation, or ``every_k`` is not a number.
      ValueError: ``every_k`` is below 1, ``accumulator_dtype`` is not a float dtype, or
        ``moments=`` lacks a mean square or ``l1`` that is to be kept.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.zeros(2)}
      >>> tx = accumulate_moments(optax.sgd(1.0), every_k=2)
      >>> state = tx.init(params)
      >>> for g in ([1.0, 2.0], [3.0, -2.0]):
      ...     updates, state = tx.update({"w": jnp.array(g)}, state, params)
      ...     print(updates["w"])
      [0. 0.]
      [-2. -0.]

    References:
      Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983,
      eq. 2.1, with weights, for the deviation.
    """
    _validate.check_transformation("inner", inner)
    if not (callable(every_k) or isinstance(every_k, ChoosesMicrobatches)):
        _validate.check_count("every_k", every_k, 1, "1 takes a step on every call")
    _validate.check_flags(
        mean_square=mean_square, l1=l1, reject_nonfinite=reject_nonfinite
    )
    _validate.check_float_dtype("accumulator_dtype", accumulator_dtype, optional=True)
    _validate.check_axis_name("axis_name", axis_name)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return init_state(
            inner.init(params),
            params,
            mean_square=mean_square,
            l1=l1,
            dtype=accumulator_dtype,
        )

    def update_fn(updates, state, params=None, *, weight=None, moments=None, **extra):
        losses = given_losses(extra)
        loss = loss_of(extra, needed=False, axis_name=axis_name)
        incoming = _incoming(
            updates,
            loss,
            weight,
            moments,
            mean_square=mean_square,
            l1=l1,
            axis_name=axis_name,
        )
        window = window_of(state)
        sq_distances = _moments.squared_distances(window, updates, axis_name)
        keep = _moments.usable_weight(incoming.moments.weight)
        if reject_nonfinite:
            keep &= _moments.all_finite(
                updates,
                incoming.value,
                sq_distances=sq_distances,
                axis_name=axis_name,
            )
        keep = _mesh_axes.everywhere(keep, axis_name)
        incoming = _moments.if_kept(incoming, keep)
        window = _moments.merge(window, incoming, sq_distances, axis_name)

        rejected = jnp.where(keep, 0, 1)
        state = state._replace(
            rejected_total=_numerics.increment(state.rejected_total, rejected)
        )
        k = _calls_per_step(every_k, state)
        return step_if_full(
            inner,
            state,
            window,
            state.mini_step + 1 >= k,
            params,
            extra | dict.fromkeys(losses, window.value),
            like=updates,
        )

    return checked(
        "accumulate_moments",
        AccumulateMomentsState,
        init_fn,
        update_fn,
        stored=lambda state: state.acc_grads,
        inexact=True,
    )
