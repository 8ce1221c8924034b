"""Published clipping rules by name; each is only a threshold and a scope.

*Where in the chain*: before Adam. *Cost*: that of ``clip_by_threshold``.
"""

from typing import Any

import jax
import optax

from optax_stability import thresholds
from optax_stability._clipping._clipping import clip_by_threshold
from optax_stability._core import _mesh_axes, _validate
from optax_stability._core._scopes import Scope
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._zscore import Mode


def _relearn(threshold: Threshold, after: int | None) -> Threshold:
    if after is None:
        return threshold
    _validate.check_count("relearn_after", after, 1, "25 is the default")
    return thresholds.relearn(threshold, after=after)


def clip_by_zscore(
    z_max: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int | jax.Array = 25,
    mode: Mode = "adaptive",
    published: bool = False,
    relearn_after: int | None = 25,
    at_most_median: bool = True,
    scope: Scope = "global",
    stacked: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: clips a norm that is ``z_max`` deviations above its recent mean.

    ``clip_by_threshold(at_most_median(relearn(zscore(…), after=relearn_after)))``: the
    published rule never accepts a lasting rise of the norm; ``relearn`` does. It leaves
    ordinary norms as they are; ``at_most_median`` evens them out, as a fixed clip below
    the usual norm does: so about every second ordinary step is clipped, by little, and
    the first 32, whose norms may be far above all later ones, to a share of their
    median that rises from 1/32 to 1.

    Guarantees and edge cases are those of :func:`clip_by_threshold`,
    :func:`thresholds.zscore`, :func:`thresholds.relearn` and
    :func:`thresholds.at_most_median`. What the arguments say of steps that are clipped
    is said of outliers; ``at_most_median`` comes on top.

    Args:
      z_max: limit of normal norms in standard deviations above the mean, > 0.
      decay: share of the average kept per step, in [0, 1).
      warmup: steps before the first regular limit, ≥ 1; before it, only a norm above
        ten times the mean of the norms before it is clipped, to this multiple.
      mode: ``"adaptive"`` (the paper's), ``"mean"`` or ``"max"``.
      published: True for the warm-up of the paper, in which nothing is clipped and a
        spike is learned as it is: the clip is then blind for a hundred steps.
      relearn_after: consecutive steps above the limit after which the present level is
        accepted; None for the rule as published.
      at_most_median: False for the rule as published, which clips outliers alone.
      scope: see :func:`clip_by_threshold`.
      stacked: see :func:`clip_by_threshold`.
      axis_name: see :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`ClipByThresholdState`.

    Raises:
      TypeError: ``published`` or ``at_most_median`` is not True or False.
      ValueError: an argument is outside its range.

    Example:
      >>> import optax
      >>> tx = optax.chain(clip_by_zscore(), optax.adamw(1e-3))

    References:
      Kumar et al., "ZClip", 2025, arXiv:2504.02507. Deviations: those of
      :func:`thresholds.zscore`; ``relearn``; and the median, in place of the fixed
      ``max_grad_norm`` = 1.0 beside the rule in the official code. What each costs a
      run in which nothing is wrong: ``python benchmarks/clean_cost.py``.
    """
    threshold = thresholds.zscore(
        z_max, decay=decay, warmup=warmup, mode=mode, published=published
    )
    threshold = _relearn(threshold, relearn_after)
    _validate.check_flags(at_most_median=at_most_median)
    if at_most_median:
        threshold = thresholds.at_most_median(threshold)
    return clip_by_threshold(
        threshold, scope=scope, stacked=stacked, axis_name=axis_name
    )


def clip_by_quantile(
    q: float | jax.Array,
    *,
    window: int = 128,
    scope: Scope = "global",
    stacked: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: clips a norm to a quantile of the last ``window`` norms.

    ``clip_by_threshold(window_quantile(q, window=window))``. With the small q of the
    paper (0.1) nine steps of ten are clipped: this normalises the gradient to one of
    the smaller norms of the window. With q near 1 only the largest norms are clipped.

    Guarantees and edge cases are those of :func:`clip_by_threshold` and
    :func:`thresholds.window_quantile`.

    Args:
      q: share of the norms that is not clipped, in (0, 1].
      window: number of last norms in the window, ≥ 2; until half the window is filled,
        no finite gradient is clipped.
      scope: see :func:`clip_by_threshold`.
      stacked: see :func:`clip_by_threshold`.
      axis_name: see :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`ClipByThresholdState`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> import optax
      >>> tx = optax.chain(clip_by_quantile(0.1), optax.adamw(1e-3))

    References:
      Seetharaman et al., "AutoClip", 2020, arXiv:2007.14469.
    """
    threshold = thresholds.window_quantile(q, window=window)
    return clip_by_threshold(
        threshold, scope=scope, stacked=stacked, axis_name=axis_name
    )


def clip_by_leaf_history(
    ratio: float | jax.Array = 1.05,
    *,
    decay: float | jax.Array = 0.98,
    warmup: int | jax.Array = 100,
    relearn_after: int | None = 25,
    stacked: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: clips every leaf to a multiple of the exponential mean of its norms.

    ``clip_by_threshold(relearn(ema_ratio(…), after=relearn_after), scope="leaf")``. If
    the gradient of a single tensor explodes, only this tensor is clipped.

    **Guarantees** in addition to those of :func:`clip_by_threshold`: a leaf whose
    gradient is zero or tiny in the warm-up is not limited to that size. Zeros are not
    learned. After ``relearn_after`` steps a lasting rise to ten times the limit is
    accepted, after as many further steps a rise to a hundred times the new limit, and
    so on by squares. The published rule rises by 0.1 % per step.

    Edge cases are those of :func:`thresholds.ema_ratio` and :func:`thresholds.relearn`.

    Args:
      ratio: limit as a multiple of the exponential mean, > 0.
      decay: share of the mean kept per step, in [0, 1).
      warmup: steps with a nonzero gradient before a leaf has a finite limit, ≥ 1.
      relearn_after: consecutive steps above the limit after which the present norm is
        accepted; None for the rule as published.
      stacked: see :func:`clip_by_threshold`.
      axis_name: see :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`ClipByThresholdState`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> import optax
      >>> tx = optax.chain(clip_by_leaf_history(), optax.adamw(1e-3))

    References:
      Wang et al., "AdaGC", 2025, arXiv:2502.11034. Deviation: no global clip in the
      warm-up; ``adagc`` in ``examples/recipes.py`` adds it.
    """
    threshold = thresholds.ema_ratio(ratio, decay=decay, warmup=warmup)
    threshold = _relearn(threshold, relearn_after)
    return clip_by_threshold(
        threshold, scope="leaf", stacked=stacked, axis_name=axis_name
    )
