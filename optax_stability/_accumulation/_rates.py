"""Learning-rate scaling for larger batches.

*Where*: on the host, once, around the learning rate or its schedule. *Cost*: nothing.
"""

import math
from typing import Literal, get_args, overload

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _validate

Rule = Literal["linear", "sqrt"]


@overload
def scale_learning_rate(
    lr: float, num_microbatches: int, rule: Rule = "linear"
) -> float: ...


@overload
def scale_learning_rate(
    lr: optax.Schedule,
    num_microbatches: int | jax.Array | optax.Schedule,
    rule: Rule = "linear",
) -> optax.Schedule: ...


@overload
def scale_learning_rate(
    lr: optax.ScalarOrSchedule,
    num_microbatches: int | jax.Array | optax.Schedule,
    rule: Rule = "linear",
) -> optax.ScalarOrSchedule: ...


def scale_learning_rate(
    lr: optax.ScalarOrSchedule,
    num_microbatches: int | jax.Array | optax.Schedule,
    rule: Rule = "linear",
) -> optax.ScalarOrSchedule:
    """Scales a learning rate for one microbatch per step to K microbatches per step.

    **Rule**: ``"linear"`` lr·K, ``"sqrt"`` lr·√K. The rule depends on the optimizer::

      SGD, with or without momentum                  linear
      scale_by_safe_adam(second_moment="microbatch") linear
      standard Adam                                  sqrt

    The first two keep the training trajectory, to first order in lr. The last keeps the
    size of Adam's update only where noise dominates the gradient; elsewhere the steps
    are too small: see ``python benchmarks/batch_invariance.py``.

    **Edge cases**: a large lr·K diverges, whatever the rule; use a warm-up. A schedule
    counts gradient steps: with K times fewer steps, make the schedule K times shorter.

    Args:
      lr: learning rate for one microbatch, or a schedule of it.
      num_microbatches: K ≥ 1, or a schedule that maps the gradient step to K, such as
        the ``every_k`` of :func:`accumulate_moments`.
      rule: ``"linear"`` or ``"sqrt"``.

    Returns:
      A number, or a schedule if ``lr`` or ``num_microbatches`` is one.

    Raises:
      TypeError: an argument is not a number.
      ValueError: ``lr`` is negative, K is below 1, or the rule is unknown.

    Example:
      >>> scale_learning_rate(1e-3, 4), scale_learning_rate(1e-3, 4, "sqrt")
      (0.004, 0.002)

    References:
      Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, §2.1
      (linear). Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient
      Algorithms", 2022, arXiv:2205.10287 (square root, for Adam under noise). Wang &
      Aitchison, 2024, arXiv:2402.18824 (linear, for the mean of squares).
    """
    _validate.check_choice("rule", rule, get_args(Rule))
    if not callable(num_microbatches):
        remedy = "1 changes nothing"
        _validate.check_count("num_microbatches", num_microbatches, 1, remedy)
    _validate.check_rate("lr", lr)
    if not callable(lr) and not callable(num_microbatches):
        return _scaled(lr, num_microbatches, rule)

    def schedule(step):
        rate = lr(step) if callable(lr) else lr
        k = num_microbatches(step) if callable(num_microbatches) else num_microbatches
        return _scaled(rate, k, rule)

    return schedule


def _scaled(lr, k, rule: Rule):
    k = k if _validate.is_concrete(k) else jnp.asarray(k, jnp.float32)
    if rule == "linear":
        return lr * k
    return lr * (math.sqrt(k) if _validate.is_concrete(k) else jnp.sqrt(k))
