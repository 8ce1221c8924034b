"""AdamW on top of safe Adam, with the signature of ``optax.adamw``.

*Where in the chain*: last, in place of ``optax.adamw``.

*Cost*: that of ``scale_by_safe_adam``; decay and learning rate fuse into the same pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_stability._adam._adam import EpsMode, SecondMoment, scale_by_safe_adam
from optax_stability._adam._state import SafeAdamState
from optax_stability._core import _leaves, _states, _validate

_CHAIN_LENGTH = 3


def _decay(weight_decay, mask) -> optax.GradientTransformationExtraArgs:
    """``optax.add_decayed_weights``; without a decay it needs no parameters."""
    none = _validate.is_concrete(weight_decay) and weight_decay == 0
    decayed = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is not None:
            try:
                return decayed.update(updates, state, params)
            except ValueError:
                _leaves.check_params("safe_adamw", params, updates)
                raise
        if none:
            return updates, state
        raise ValueError(
            f"safe_adamw(weight_decay={weight_decay!r}) needs params: call "
            "tx.update(grads, state, params), or give weight_decay=0.0."
        )

    return optax.GradientTransformationExtraArgs(decayed.init, update_fn)


def safe_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array | optax.Schedule = 0.0,
    *,
    weight_decay: float | jax.Array = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    eps_mode: EpsMode = "add",
    second_moment: SecondMoment = "mean",
    update_rms_max: float | jax.Array | None = None,
    spike_ratio: float | jax.Array | None = None,
    mu_dtype: Any = None,
    rms_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw`` with :func:`scale_by_safe_adam` in place of Adam.

    **Rule**: p ← p − learning_rate·(u + weight_decay·p), u from
    :func:`scale_by_safe_adam`, which lists guarantees and edge cases.

    Args:
      learning_rate: step size, or a schedule of it.
      b1: β₁, decay of the mean.
      b2: β₂, decay of the mean square.
      eps: ε, or a schedule of it; 0 is safe.
      weight_decay: decoupled from the gradient, multiplied by the learning rate.
      mask: which parameters decay: a tree of booleans, or a callable that returns
        one for the parameters, as in ``optax.adamw``.
      eps_mode: see :func:`scale_by_safe_adam`.
      second_moment: see :func:`scale_by_safe_adam`.
      update_rms_max: see :func:`scale_by_safe_adam`.
      spike_ratio: see :func:`scale_by_safe_adam`.
      mu_dtype: see :func:`scale_by_safe_adam`.
      rms_dtype: see :func:`scale_by_safe_adam`.

    Returns:
      The chain ``scale_by_safe_adam → add_decayed_weights → scale_by_learning_rate``.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is outside its range; or, at ``update``, ``params`` are
        missing and ``weight_decay`` is not 0.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> tx = safe_adamw(0.1)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> [f"{x:.3f}" for x in optax.apply_updates(params, updates)["w"]]
      ['0.900', '-1.900']

    References:
      Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019,
      arXiv:1711.05101, Algorithm 2, with the learning rate as η·α, as in optax.
    """
    _validate.check_rate("learning_rate", learning_rate)
    if not callable(mask):
        for flag in jax.tree.leaves(mask):
            _validate.check_flags(mask=flag)
    remedy = "0 is no decay"
    _validate.check_interval("weight_decay", weight_decay, "[0, inf)", remedy)
    chain = optax.chain(
        scale_by_safe_adam(
            b1,
            b2,
            eps,
            eps_mode=eps_mode,
            second_moment=second_moment,
            update_rms_max=update_rms_max,
            spike_ratio=spike_ratio,
            mu_dtype=mu_dtype,
            rms_dtype=rms_dtype,
        ),
        _decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def update_fn(updates, state, params=None, **extra_args):
        # The chain only says that the number of states is wrong.
        if type(state) is not tuple or len(state) != _CHAIN_LENGTH:
            _states.check_state("safe_adamw", state, SafeAdamState)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)
