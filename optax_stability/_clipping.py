"""Scales gradients down to a limit that a threshold sets.

*Problem*: a fixed ``max_norm`` is either inert or always active as norms drift, and
``g·max_norm/norm`` turns one Inf into NaN everywhere.

*Where in the chain*: after ``record`` and ``estimate_noise_scale``, before Adam.

*Cost*: one reduction per leaf and a multiply by a scalar, which XLA fuses into what
follows: the clipped gradient is never written out. State: a few scalars per stream.

*Source*: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
networks", 2013, arXiv:1211.5063, Algorithm 1, with the limit left to the threshold.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_stability import _numerics, _tree, _validate, thresholds
from optax_stability.thresholds import Threshold


class ClipByThresholdState(NamedTuple):
    """State of :func:`clip_by_threshold`.

    Attributes:
      step: int32[] – calls of ``update``.
      clipped_total: int32[] – steps at which a norm was above its limit.
      nonfinite_total: int32[] – steps at which a norm was not finite.
      norm: float32[] – last L2 norm of the whole gradient, before clipping.
      limit: float32[] – last limit; with several scopes √Σ limit².
      leaf_norm: float32[n_leaves] – last norm of the scope each leaf is in, or None
        with scope ``"global"``.
      leaf_limit: float32[n_leaves] – last limit of that scope, or None likewise.
      threshold: state of the threshold, every array with a leading axis of one entry
        per scope.
      leaves: marks that name the entries of the per-leaf vectors, or None likewise.
    """

    step: jax.Array
    clipped_total: jax.Array
    nonfinite_total: jax.Array
    norm: jax.Array
    limit: jax.Array
    leaf_norm: Any
    leaf_limit: Any
    threshold: Any
    leaves: Any

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``clip/…``: norms and limits of the last step, and counts since ``init``."""
        scalars = {
            "clip/norm": self.norm,
            "clip/limit": self.limit,
            "clip/fraction": self.clipped_total / jnp.maximum(self.step, 1),
            "clip/nonfinite_total": self.nonfinite_total,
        }
        if self.leaf_norm is None or self.leaf_limit is None:
            return scalars
        return scalars | {
            "clip/norm/per_leaf": self.leaf_norm,
            "clip/limit/per_leaf": self.leaf_limit,
        }


def _groups(tree, scope) -> np.ndarray:
    """The number of the scope that each leaf is in, counted from 0."""
    leaves = jax.tree.leaves(tree)
    if scope == "global":
        return np.zeros(len(leaves), np.int32)
    if scope == "leaf":
        return np.arange(len(leaves), dtype=np.int32)
    labels = jax.tree.leaves(jax.tree.broadcast(scope(tree), tree))
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels], np.int32)


def _num_groups(groups: np.ndarray) -> int:
    return int(groups.max()) + 1 if groups.size else 1


def _scope_norms(tree, groups, axis_name):
    """The norm of each scope, float32[n_scopes]."""
    num_groups = _num_groups(groups)
    if num_groups == 1:
        return _tree.global_norm(tree, axis_name)[None]
    leaf_norms = _tree.leaf_norms(tree, axis_name)
    return _tree.join_norms_by_group(leaf_norms, groups, num_groups)


def _scale_leaf(leaf, factor, finite):
    """The leaf times a float32 factor, or zero where the norm was not finite."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    scaled = (leaf.astype(wide) * factor).astype(leaf.dtype)
    return jnp.where(finite, scaled, jnp.zeros((), leaf.dtype))


def clip_by_threshold(
    threshold: Threshold,
    *,
    scope: str | Callable[[Any], Any] = "global",
    axis_name: _tree.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to the threshold's limit, globally or per leaf.

    The direction of what shares a scope is kept; only its length changes.

    **Rule**, for every scope (the whole tree, a leaf, a group), n = ‖g‖₂ in float32::

      limit, state = threshold.update(n, state)
      g ← g·limit/n   if n > limit
      g ← 0           if n is not finite
      g               otherwise, bit for bit

    **Guarantees**

    * The norm after clipping is at most the limit, to rounding in the leaf's dtype.
    * Inactive means identity.
    * A non-finite gradient gives zero updates for its scope and is not learned, at any
      step; the other scopes go on.
    * A finite gradient of any size is measured right, though 1e20² overflows.

    **Edge cases**: an all-zero gradient passes; an empty tree has norm 0. Subnormal
    numbers become zero wherever the backend flushes them, and with them a gradient
    whose limit/n is below 1e-38. A norm below 1e-20 may be read as 0, and then passes.

    Args:
      threshold: what is normal, from :mod:`optax_stability.thresholds`.
      scope: ``"global"`` for one stream, the norm of the whole tree; ``"leaf"`` for one
        stream per leaf; or a callable from the tree to a tree (or tree prefix) of
        labels, for one stream per label.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient, to sum
        norms over. Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`ClipByThresholdState` and metrics
      ``clip/norm``, ``clip/limit``, ``clip/fraction`` (share of steps clipped),
      ``clip/nonfinite_total`` and, unless the scope is global, ``clip/norm/per_leaf``
      and ``clip/limit/per_leaf``.

    Raises:
      TypeError: ``threshold`` is not a ``Threshold``.
      ValueError: ``scope`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_by_threshold(thresholds.constant(1.0))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], state.metrics["clip/norm"])
      [0.6 0.8] 5.0
    """
    if not isinstance(threshold, Threshold):
        raise TypeError(
            f"threshold must be a Threshold, got {threshold!r}; for a fixed limit use "
            "thresholds.constant(limit)."
        )
    if not callable(scope):
        _validate.check_choice("scope", scope, ("global", "leaf"))

    def init_fn(params):
        groups = _groups(_tree.pure(params), scope)
        streams = jnp.zeros((_num_groups(groups),), jnp.float32)
        per_leaf = scope != "global"
        return ClipByThresholdState(
            step=jnp.zeros((), jnp.int32),
            clipped_total=jnp.zeros((), jnp.int32),
            nonfinite_total=jnp.zeros((), jnp.int32),
            norm=jnp.zeros((), jnp.float32),
            limit=jnp.zeros((), jnp.float32),
            leaf_norm=jnp.zeros(groups.shape, jnp.float32) if per_leaf else None,
            leaf_limit=jnp.zeros(groups.shape, jnp.float32) if per_leaf else None,
            threshold=jax.vmap(lambda _: threshold.init())(streams),
            leaves=_tree.mark_leaves(params) if per_leaf else None,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        groups = _groups(updates, scope)
        norm = _scope_norms(updates, groups, axis_name)
        limit, learned = jax.vmap(threshold.update)(norm, state.threshold)

        finite, above = jnp.isfinite(norm), norm > limit
        # The inner where keeps 0/0 out of derivatives.
        factor = jnp.where(above, limit / jnp.where(above, norm, 1.0), 1.0)
        scopes = list(zip(factor, finite, strict=True))
        leaves, treedef = jax.tree.flatten(updates)
        clipped = [
            _scale_leaf(leaf, *scopes[group])
            for leaf, group in zip(leaves, groups, strict=True)
        ]
        per_leaf = scope != "global"
        return jax.tree.unflatten(treedef, clipped), ClipByThresholdState(
            step=_numerics.increment(state.step),
            clipped_total=_count(state.clipped_total, finite & above),
            nonfinite_total=_count(state.nonfinite_total, ~finite),
            norm=_tree.join_norms(norm) if per_leaf else norm[0],
            limit=_tree.join_norms(limit) if per_leaf else limit[0],
            leaf_norm=norm[groups] if per_leaf else None,
            leaf_limit=limit[groups] if per_leaf else None,
            threshold=learned,
            leaves=state.leaves,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _count(total, events):
    return jnp.where(jnp.any(events), _numerics.increment(total), total)


def clip_by_zscore(
    z_max: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int | jax.Array = 25,
    mode: str = "adaptive",
    relearn_after: int | None = 25,
    scope: str | Callable[[Any], Any] = "global",
    axis_name: _tree.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: clips a norm that is ``z_max`` deviations above its recent mean.

    ``clip_by_threshold(relearn(zscore(…), after=relearn_after))``: the published rule,
    which alone never accepts a lasting rise of the norm, with a way out of that.

    Guarantees and edge cases are those of :func:`clip_by_threshold`,
    :func:`thresholds.zscore` and :func:`thresholds.relearn`.

    Args:
      z_max: deviations above the mean that are still normal, > 0.
      decay: share of the average kept per step, in [0, 1).
      warmup: steps before the first limit, ≥ 1; until then nothing finite is clipped.
      mode: ``"adaptive"`` (the paper's), ``"mean"`` or ``"max"``.
      relearn_after: steps in a row above the limit after which the present level is the
        new normal; None for the rule as published.
      scope: see :func:`clip_by_threshold`.
      axis_name: see :func:`clip_by_threshold`.

    Returns:
      A transformation with state :class:`ClipByThresholdState`.

    Raises:
      ValueError: an argument is outside its range.

    Example:
      >>> import optax
      >>> tx = optax.chain(clip_by_zscore(), optax.adamw(1e-3))

    References:
      Kumar et al., "ZClip", 2025, arXiv:2504.02507.
    """
    threshold = thresholds.zscore(z_max, decay=decay, warmup=warmup, mode=mode)
    if relearn_after is not None:
        _validate.check_count("relearn_after", relearn_after, 1, "25 is the default")
        threshold = thresholds.relearn(threshold, after=relearn_after)
    return clip_by_threshold(threshold, scope=scope, axis_name=axis_name)
