"""The learning rate that goes with a larger batch.

*Where*: on the host, once, around the learning rate or its schedule. *Cost*: nothing.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _validate

Rule = Literal["linear", "sqrt"]


def scale_learning_rate(
    lr: optax.ScalarOrSchedule,
    num_microbatches: int | jax.Array | optax.Schedule,
    rule: Rule = "linear",
) -> optax.ScalarOrSchedule:
    """Scales a learning rate that suits one microbatch to K of them per step.

    **Rule**: ``"linear"`` lr·K, ``"sqrt"`` lr·√K. Which one fits the optimizer::

      SGD, with or without momentum                 linear
      scale_by_safe_adam(second_moment="microbatch") linear
      Adam as everyone runs it                       sqrt

    The first two keep the course of training, to first order in lr; the last keeps the
    size of Adam's update only where noise dominates the gradient, and takes too small
    steps where it does not: ``python benchmarks/batch_invariance.py``.

    **Edge cases**: a large lr·K diverges, whatever the rule says; warm up. A schedule
    counts gradient steps: with K times fewer of them, shorten it K times.

    Args:
      lr: learning rate for one microbatch, or a schedule of it.
      num_microbatches: K ≥ 1, or a schedule from the gradient step to it, such as the
        ``every_k`` of :func:`accumulate_moments`.
      rule: ``"linear"`` or ``"sqrt"``.

    Returns:
      A number, or a schedule if one of both is.

    Raises:
      TypeError: an argument is no number.
      ValueError: K is below 1, or the rule is unknown.

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
    if not callable(lr):
        _validate.check_number("lr", lr)
    if not callable(lr) and not callable(num_microbatches):
        return _scaled(lr, num_microbatches, rule)

    def schedule(step):
        rate = lr(step) if callable(lr) else lr
        k = num_microbatches(step) if callable(num_microbatches) else num_microbatches
        return _scaled(rate, k, rule)

    return schedule


def _scaled(lr, k, rule: Rule):
    if rule == "linear":
        return lr * k
    return lr * (math.sqrt(k) if _validate.is_concrete(k) else jnp.sqrt(k))
