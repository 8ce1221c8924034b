"""Gradient accumulation across calls, in the place of ``optax.MultiSteps``.

*Problem*: ``optax.MultiSteps`` runs the inner optimizer on every call, keeps three more
copies of the parameters, is poisoned for good by one NaN, drops extra arguments and
loses what Σg² would tell.

*Where in the chain*: outermost, around everything that is to see whole batches.

*Cost*: on most calls one pass that adds the gradient up; ``inner`` runs only when a
window is full. State: a float32 buffer like the parameters for the mean and, with
``mean_square``, one for the mean square; no other memory.
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
from optax_stability._core._losses import given_losses
from optax_stability._moments import _moments
from optax_stability._moments._moments import Aggregate, Moments


@runtime_checkable
class ChoosesMicrobatches(Protocol):
    """Chooses the length of a window by the state of what is accumulated for."""

    def num_microbatches(self, inner_opt_state: Any) -> jax.Array:
        """Calls in the next window, int32[], ≥ 1."""
        ...


def _check_moments(moments: Moments, weight: Any, mean_square: bool) -> None:
    if weight is not None:
        raise ValueError(
            "weight= and moments= were both given; leave weight= out, moments have one."
        )
    if mean_square and moments.mean_square is None:
        raise ValueError(
            "moments.mean_square is None: make them with microbatch_gradients(..., "
            "mean_square=True), or give accumulate_moments(..., mean_square=False)."
        )


def _incoming(
    updates, loss, weight, moments, *, mean_square: bool, axis_name
) -> Aggregate:
    """What one call brings: one microbatch, or, with moments, the mean of several."""
    if moments is None:
        weight = 1.0 if weight is None else weight
        return _moments.single(updates, loss, weight, mean_square=mean_square)
    _check_moments(moments, weight, mean_square)
    moments = moments if mean_square else moments._replace(mean_square=None)
    return Aggregate(
        mean=updates,
        value=jnp.asarray(loss, jnp.float32),
        moments=_moments.rescaled(moments, updates, axis_name),
    )


def _calls_per_step(every_k: Any, state: AccumulateMomentsState):
    """How many calls the present window has."""
    if isinstance(every_k, ChoosesMicrobatches):
        return every_k.num_microbatches(state.inner_opt_state)
    return every_k(state.gradient_step) if callable(every_k) else every_k


def flush(
    inner: optax.GradientTransformation,
    state: Any,
    params: Any = None,
    **extra_args: Any,
) -> tuple[Any, AccumulateMomentsState]:
    """Takes the step of a window that is not full, such as the last of an epoch.

    **Rule**: what :func:`accumulate_moments` would have done had the last microbatch
    filled the window; the mean is over those that are there.

    **Edge cases**: with nothing in the window the updates are 0 and ``inner`` is
    untouched. The mean comes in the dtype of ``params``, if they are given.

    Args:
      inner: the transformation that ``accumulate_moments`` wraps.
      state: its state; with NNX ``optimizer.opt_state``.
      params: the parameters, for an ``inner`` that needs them; with NNX
        ``nnx.state(model, nnx.Param)``.
      extra_args: passed on, as is the mean loss of the window, as ``value=`` unless
        they hold another.

    Returns:
      Updates and state, as plain arrays.

    Raises:
      TypeError: ``inner`` or ``state`` is something else.

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
    reject_nonfinite: bool = True,
    accumulator_dtype: Any = _numerics.FLOAT32,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages gradients over ``every_k`` calls, and then lets ``inner`` take a step.

    In the place of ``optax.MultiSteps``, and called like it: zero updates until a
    window is full.

    **Rule**, for microbatch gradients mₖ of weight nₖ, over those that are kept::

      N = Σnₖ    ḡ = Σnₖ·mₖ/N    deviation = Σnₖ‖mₖ − ḡ‖²    mean_square = Σnₖ·mₖ²/N

      kept        if every entry of mₖ and the loss are finite, and 0 < nₖ < ∞
      window full after every_k(gradient_step) calls, kept or not
      then        inner.update(ḡ, moments=Moments(...), value=Σnₖ·lossₖ/N, ...)

    **Guarantees**

    * A microbatch that is not finite changes nothing but the counts: mean, moments and
      loss are those of the others, and the calendar holds.
    * If none of a window is kept, the updates are 0 and ``inner`` is untouched.
    * ``inner`` runs once per window: its schedules count gradient steps.
    * On all other calls the updates are 0 and the state of ``inner`` is untouched, bit
      for bit.
    * A run that is resumed in the middle of a window with another ``every_k`` loses no
      microbatch and begins no window with those of another: a window that has enough
      already is closed by the next call.
    * The order of microbatches does not matter, to rounding: for float32, ḡ is within
      2⁻²⁰ of the largest |mₖ|, for up to 64 of them.

    **Edge cases**

    * A leaf whose norm is above 8e37 counts as not finite.
    * What clips or skips *inside*, ``accumulate_moments(chain(clip, adam))``, sees the
      whole batch once; in front of it, ``chain(clip, accumulate_moments(adam))``, every
      microbatch.
    * ``inner`` gets ḡ in the dtype of the gradients, and other extra arguments as the
      last call of the window gave them.
    * Layers that use statistics of the batch, such as BatchNorm, still see microbatches
      only: accumulation does not make their batch larger.
    * Reverse-mode differentiation does not pass.

    Args:
      inner: what takes the steps: the whole chain.
      every_k: calls per step, ≥ 1; or a schedule from the gradient step to it; or a
        :func:`batch_size_schedule`, which follows the noise scale.
      mean_square: keep Σnₖ·mₖ² as well, for
        ``scale_by_safe_adam(second_moment="microbatch")``; costs one buffer.
      reject_nonfinite: False keeps every microbatch, whatever it holds.
      accumulator_dtype: of the mean; narrower than float32 it loses small gradients.
        Gradients narrower than it need a copy in its dtype while ``inner`` runs.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient: all devices
        keep or reject alike, and deviations are those of whole leaves. Leave it None
        under ``jit``.

    Returns:
      A transformation with state :class:`AccumulateMomentsState`. Its ``update`` takes
      ``weight=`` (nₖ, 1 by default), the loss as ``value=`` or ``loss=``, and
      ``moments=`` where :func:`microbatch_gradients` made the gradient from several
      microbatches. Metrics: ``accumulate/mini_step`` (0 after a step),
      ``accumulate/num_microbatches`` (kept in the window so far, after a step in that
      of the step) and ``accumulate/rejected_total``. See :func:`has_updated` and
      :func:`flush`.

    Raises:
      TypeError: ``inner`` is no transformation, or ``every_k`` no number.
      ValueError: ``every_k`` is below 1, ``accumulator_dtype`` is no float dtype, or
        ``moments=`` lack what is asked for.

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
    _validate.check_float_dtype("accumulator_dtype", accumulator_dtype)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return init_state(
            inner.init(params),
            params,
            mean_square=mean_square,
            dtype=accumulator_dtype,
        )

    def update_fn(updates, state, params=None, *, weight=None, moments=None, **extra):
        losses = given_losses(extra)
        loss = _mesh_axes.mean(next(iter(losses.values()), 0.0), axis_name)
        incoming = _incoming(
            updates,
            loss,
            weight,
            moments,
            mean_square=mean_square,
            axis_name=axis_name,
        )
        window = window_of(state)
        apart = _moments.distances(window, updates, axis_name)
        keep = _moments.usable_weight(incoming.moments.weight)
        if reject_nonfinite:
            keep &= _moments.all_finite(
                updates, incoming.value, apart=apart, axis_name=axis_name
            )
        keep = _mesh_axes.everywhere(keep, axis_name)
        window = _moments.merge(window, _moments.if_kept(incoming, keep), apart)

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

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
