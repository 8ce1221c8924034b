"""Resets the optimizer's statistics, periodically or after a spike.

*Problem*: one spiked gradient stays in Adam's moments for thousands of steps.

*Where in the chain*: around the transformation with the moments: ``restart_moments(
scale_by_safe_adam())``, before weight decay and learning rate.

*Cost*: a conditional that writes a fresh state in place; one norm with ``on_spike``.

*Source*: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
Training", 2025, arXiv:2501.06842, Algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability import thresholds
from optax_stability._core import _known_norms, _mesh_axes, _tree, _validate
from optax_stability._core._checked import checked
from optax_stability._core._in_place import select_if
from optax_stability._core._numerics import increment, real_dtype, scale
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import check_threshold, learn, state_for


class RestartMomentsState(NamedTuple):
    """State of :func:`restart_moments`.

    Attributes:
      step: int32[] – calls of ``update``.
      age: int32[] – steps since the last restart, or since the start.
      total: int32[] – restarts.
      last_step: int32[] – step after which the last restart came, −1 if there was none.
      threshold: state of ``on_spike``, or ().
      inner_state: state of ``inner``.
    """

    step: jax.Array
    age: jax.Array
    total: jax.Array
    last_step: jax.Array
    threshold: Any
    inner_state: Any

    reports_metrics = True  # For ost.metrics.

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``restart/…``: how often and when the moments were reset."""
        return {
            "restart/total": self.total,
            "restart/last_step": self.last_step,
            "restart/age": self.age,
        }


def _ramp(age, restarted, warmup: int):
    """The factor on the update ``age`` steps after a restart."""
    progress = jnp.minimum((age + 1) / (warmup + 1), 1.0)
    return jnp.where(restarted, 0.5 - 0.5 * jnp.cos(jnp.pi * progress), 1.0)


def restart_moments(
    inner: optax.GradientTransformation,
    *,
    every: int | None = None,
    on_spike: Threshold | None = None,
    warmup: int = 0,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Resets the state of ``inner`` periodically, or after a spike.

    A spike that was applied stays in the moments: in the first for about 1/(1 − β₁)
    steps, in the second for 1/(1 − β₂). A restart removes it, and restarts bias
    correction as well.

    **Rule**, after each update u = inner(g)::

      restart if  every given and age = every
              or  on_spike given and ‖g‖ > limit from earlier steps
      restart:    inner_state ← inner.init(params), age ← 0
      then        u ← u·½(1 − cos(π·(age + 1)/(warmup + 1)))  while age < warmup

    **Guarantees**

    * The spike itself is applied with the old moments, and the restart follows: the new
      moments do not start from the spike.
    * Before the first restart, updates are those of ``inner``, bit for bit.
    * A non-finite gradient is no spike and is not learned by ``on_spike``. It
      is passed to ``inner``, which must tolerate it, as ``scale_by_safe_adam`` does.
    * Every step is taken, whatever ``on_spike`` finds: training never freezes.

    **Edge cases**: everything in the state of ``inner`` is reset, a learning-rate
    schedule too: wrap only the transformation with the moments, not the whole
    optimizer. Right after a restart Adam's update is the sign of one gradient;
    ``warmup`` softens that. Inside ``skip_spikes``, skipped spikes do not arrive here.
    Reverse mode passes: the derivative is that of the steps that are taken.

    Args:
      inner: transformation whose state is reset.
      every: steps between restarts, ≥ 1, or None. SPAM uses 500.
      on_spike: threshold on the L2 norm of the gradient, or None.
      warmup: steps after a restart over which the update grows back, ≥ 0. SPAM uses
        150; with 0 the full update is applied at once.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient; see
        :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`RestartMomentsState` and metrics
      ``restart/total``, ``restart/last_step`` and ``restart/age``.

    Raises:
      ValueError: neither ``every`` nor ``on_spike`` is given, an argument is outside
        its range, or ``update`` is called without ``params``.
      TypeError: ``inner`` is not a transformation, ``on_spike`` not a ``Threshold``.

    Example:
      >>> import optax
      >>> from optax_stability import scale_by_safe_adam
      >>> tx = optax.chain(
      ...     restart_moments(scale_by_safe_adam(), every=500, warmup=150),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )

    References:
      SPAM, arXiv:2501.06842, Algorithm 1. Deviations: bias correction restarts with the
      moments (the official code keeps its step count, so that the first updates after a
      reset are too small by 1 − β); ``on_spike``; SPAM's element-wise clip is
      ``scale_by_safe_adam(spike_ratio=5000)``.
    """
    _validate.check_transformation("inner", inner)
    if every is None and on_spike is None:
        raise ValueError(
            "every=None and on_spike=None would never restart; give every=500, or "
            "on_spike=thresholds.detrended_mad(5.0, floor=5.0)."
        )
    if every is not None:
        _validate.check_count("every", every, 1, "500 is the published value")
    check_threshold("on_spike", on_spike, optional=True)
    _validate.check_count("warmup", warmup, 0, "150 is the published value")
    _validate.check_axis_name("axis_name", axis_name)
    inner = optax.with_extra_args_support(inner)
    threshold = on_spike or thresholds.constant(float("inf"))

    def init_fn(params):
        return RestartMomentsState(
            step=jnp.zeros((), jnp.int32),
            age=jnp.zeros((), jnp.int32),
            total=jnp.zeros((), jnp.int32),
            last_step=jnp.full((), -1, jnp.int32),
            threshold=state_for(threshold, real_dtype(_tree.pure(params))),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "params=None: restart_moments resets the state from params; call "
                "tx.update(grads, state, params)."
            )
        age = increment(state.age)
        restart, learned = jnp.zeros((), bool), state.threshold
        if on_spike is not None:
            norm = _known_norms.global_norm(updates, axis_name)
            limit, learned = learn(threshold, norm, state.threshold)
            restart = jnp.isfinite(norm) & (norm > limit)
        if every is not None:
            restart |= age >= every

        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        if warmup:
            factor = _ramp(state.age, state.total > 0, warmup)
            updates = jax.tree.map(lambda leaf: scale(leaf, factor), updates)
        return updates, RestartMomentsState(
            step=increment(state.step),
            age=jnp.where(restart, 0, age),
            total=jnp.where(restart, increment(state.total), state.total),
            last_step=jnp.where(restart, state.step, state.last_step),
            threshold=learned,
            inner_state=select_if(restart, lambda _: inner.init(params), inner_state),
        )

    return checked("restart_moments", RestartMomentsState, init_fn, update_fn)
