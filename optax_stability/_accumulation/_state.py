"""State of gradient accumulation, and the step at the end of a window.

*Cost*: one buffer like the parameters for the mean, one for the mean square if it is
kept, and a few scalars. The update is written over the mean: no other memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _norms, _states, _tree
from optax_stability._core._in_place import apply_if, depends_on
from optax_stability._core._numerics import cast_like, increment
from optax_stability._moments import _moments
from optax_stability._moments._moments import Aggregate, Moments


class AccumulateMomentsState(NamedTuple):
    """State of :func:`accumulate_moments`.

    "real" is float64 if a parameter is float64 or complex128, else float32.

    Attributes:
      mini_step: int32[] – calls in the current window, kept or not.
      gradient_step: int32[] – steps that ``inner`` has taken.
      updated: bool[] – whether ``inner`` took a step in the last call.
      rejected_total: int32[] – calls whose gradient was not kept.
      inner_opt_state: state of ``inner``.
      acc_grads: tree like the parameters, ``accumulator_dtype`` – mean of the gradients
        in the window. Has no meaning while ``mini_step`` is 0.
      value: real[] – mean loss of the window, 0 if no loss was given.
      moments: statistics of the window; its ``norm`` is None.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    updated: jax.Array
    rejected_total: jax.Array
    inner_opt_state: Any
    acc_grads: Any
    value: jax.Array
    moments: Moments

    reports_metrics = True  # For ost.metrics.
    number = "mini_step"  # This field is one number.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``accumulate/…``: calls in the window, microbatches kept and rejected."""
        return {
            "accumulate/num_microbatches": self.moments.num_microbatches,
            "accumulate/mini_step": self.mini_step,
            "accumulate/rejected_total": self.rejected_total,
        }


def init_state(
    inner_opt_state: Any, params: Any, *, mean_square: bool, l1: bool, dtype: Any
) -> AccumulateMomentsState:
    """The state before the first microbatch; ``dtype`` is the dtype of the mean."""
    empty = _moments.empty(params, mean_square=mean_square, l1=l1, dtype=dtype)
    return AccumulateMomentsState(
        mini_step=jnp.zeros((), jnp.int32),
        gradient_step=jnp.zeros((), jnp.int32),
        updated=jnp.zeros((), bool),
        rejected_total=jnp.zeros((), jnp.int32),
        inner_opt_state=inner_opt_state,
        acc_grads=empty.mean,
        value=empty.value,
        moments=empty.moments,
    )


def window_of(state: AccumulateMomentsState) -> Aggregate:
    """The aggregate of the current window; its weight is 0 at the start."""
    started = state.mini_step > 0
    scalars = (
        state.moments.num_microbatches,
        state.moments.weight,
        state.moments.deviation,
        state.moments.l1,
    )
    count, weight, deviation, l1 = jax.tree.map(
        lambda each: jnp.where(started, each, 0), scalars
    )
    # At the start the buffers still hold the last update; weight 0 excludes it.
    moments = state.moments._replace(
        num_microbatches=count, weight=weight, deviation=deviation, l1=l1
    )
    return Aggregate(mean=state.acc_grads, value=state.value, moments=moments)


def step_if_full(
    inner: optax.GradientTransformationExtraArgs,
    state: AccumulateMomentsState,
    window: Aggregate,
    full,
    params: Any,
    extra_args: dict[str, Any],
    *,
    like: Any,
) -> tuple[Any, AccumulateMomentsState]:
    """Continues the window, or ends it if it is ``full``.

    At the end ``inner`` takes a step on the mean, unless no microbatch was kept.

    Args:
      inner: the transformation that takes the steps.
      state: the state before this call.
      window: the aggregate of the current window, including this call.
      full: bool[] – whether the window ends.
      params: the parameters, or None.
      extra_args: for ``inner``.
      like: tree with the dtypes in which ``inner`` gets the mean.
    """

    def update(mean, inner_state):
        mean = cast_like(mean, like)
        moments = window.moments._replace(norm=_norms.leaf_norms(mean))
        return inner.update(mean, inner_state, params, moments=moments, **extra_args)

    run = full & (window.moments.num_microbatches > 0)
    updates, acc_grads, inner_opt_state = apply_if(
        depends_on(run, window.moments.deviation),
        update,
        window.mean,
        state.inner_opt_state,
    )
    return updates, AccumulateMomentsState(
        mini_step=jnp.where(full, 0, increment(state.mini_step)),
        gradient_step=jnp.where(
            run, increment(state.gradient_step), state.gradient_step
        ),
        updated=run,
        rejected_total=state.rejected_total,
        inner_opt_state=inner_opt_state,
        acc_grads=acc_grads,
        value=window.value,
        moments=window.moments,
    )


def check_state(state: Any) -> AccumulateMomentsState:
    """The state with plain arrays in place of NNX variables."""
    _states.check_not_transformation(state)
    if not isinstance(state, AccumulateMomentsState):
        raise TypeError(
            "state must be the state of accumulate_moments, got "
            f"{type(state).__name__}; if another transformation wraps "
            "accumulate_moments, pass its inner state."
        )
    state = _tree.pure(state)
    _states.check_single(state)
    return state


def has_updated(state: Any) -> jax.Array:
    """Whether the last call of :func:`accumulate_moments` took a step, bool[].

    Args:
      state: an :class:`AccumulateMomentsState`; with NNX ``optimizer.opt_state``.

    Returns:
      True if ``inner`` ran and made the updates; False if the updates were zeros.

    Raises:
      TypeError: ``state`` is not an :class:`AccumulateMomentsState`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import accumulate_moments
      >>> params = {"w": jnp.ones(2)}
      >>> tx = accumulate_moments(optax.sgd(0.1), every_k=2)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(has_updated(state))
      False
    """
    return check_state(state).updated
