"""Clips gradients to a limit from a threshold.

*Problem*: norms drift, so that a fixed ``max_norm`` is either never or always active;
and ``g·max_norm/norm`` turns one Inf into NaN in the whole gradient.

*Where in the chain*: after ``record`` and ``estimate_noise_scale``, before Adam.

*Cost*: one reduction per leaf and a multiply by a scalar, which XLA fuses into the next
operation: the clipped gradient is never written to memory. State: a few scalars per
stream.

*Source*: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
networks", 2013, arXiv:1211.5063, Algorithm 1, with the limit from a threshold.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import (
    _leaves,
    _mesh_axes,
    _norms,
    _numerics,
    _states,
    _tree,
    _validate,
)
from optax_stability._core._checked import checked
from optax_stability._core._scopes import (
    Parts,
    Scope,
    for_leaves,
    per_leaf_vector,
    scope_norms,
    split,
)
from optax_stability.thresholds import Threshold
from optax_stability.thresholds._threshold import check_threshold, learn, state_for


class ClipByThresholdState(NamedTuple):
    """State of :func:`clip_by_threshold`.

    "real" is float64 if a leaf is float64 or complex128, else float32.

    Attributes:
      step: int32[] – calls of ``update``.
      clipped_total: int32[] – steps at which a norm was above its limit.
      nonfinite_total: int32[] – steps at which a norm was not finite.
      norm: real[] – last L2 norm of the whole gradient, before clipping.
      limit: real[] – last limit; with several scopes √Σ limit².
      leaf_norm: real[n_leaves] – for each leaf, last norm of its scope (for a
        stacked leaf, of all its layers together); None with scope ``"global"``.
      leaf_limit: real[n_leaves] – for each leaf, last limit of its scope; None with
        scope ``"global"``.
      threshold: state of the threshold; every array has a leading axis with one entry
        per scope, in the order of the leaves.
      leaves: placeholders that give the names of the leaves; None with scope
        ``"global"``.
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

    reports_metrics = True  # For ost.metrics.

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


@jax.jit
def _scaled_or_zero(leaf, factor, keep):
    return jnp.where(keep, _numerics.scale(leaf, factor), jnp.zeros((), leaf.dtype))


def _scale(updates, factor, finite, parts: Parts):
    """Multiplies every leaf by its factor; zero where its norm is not finite."""
    leaves, treedef = jax.tree.flatten(updates)
    by_leaf = (for_leaves(values, leaves, parts) for values in (factor, finite))
    scaled = list(map(_scaled_or_zero, leaves, *by_leaf))
    return jax.tree.unflatten(treedef, scaled)


def clip_by_threshold(
    threshold: Threshold,
    *,
    scope: Scope = "global",
    stacked: Any = None,
    axis_name: _mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient down to the threshold's limit, globally or per leaf.

    Within a scope the direction of the gradient is kept; only its length changes.

    **Rule**, for every scope (the whole tree, a leaf, a group), n = √Σ|x|² over its
    entries, in float32, or in float64 if a leaf of the tree is float64 or complex128::

      limit, state = threshold.update(n, state)
      g ← g·limit/n   if n > limit
      g ← 0           if n is not finite
      g               otherwise, bit for bit

    **Guarantees**

    * The norm after clipping is at most the limit, to rounding in the leaf's dtype.
    * A gradient that is not clipped is returned unchanged, bit for bit.
    * A non-finite gradient gives zero updates for its scope and is not learned, at any
      step; the other scopes are not affected.
    * The norm of a finite gradient of any size is correct, although 1e20² overflows.
      Limits for float64 gradients have the range and the digits of float64.
    * Complex entries count by their modulus and keep their phase.

    **Edge cases**: an all-zero gradient is not clipped; an empty tree has norm 0. If
    the backend flushes subnormal numbers to zero, a gradient with limit/n below 1e-38
    becomes zero. A norm below 1e-20 may be measured as 0; the gradient is then not
    clipped.

    Args:
      threshold: sets the limit, from :mod:`optax_stability.thresholds`.
      scope: ``"global"`` for one stream, the norm of the whole tree; ``"leaf"`` for one
        stream per leaf; or a callable from the tree to a tree (or tree prefix) of
        labels, for one stream per label.
      stacked: which leaves hold several layers along their first axis, as ``nnx.scan``
        and ``nn.scan`` stack them: a tree (or tree prefix) of bools or a callable from
        the tree to one, as in ``optax.masked``. With scope ``"leaf"`` each layer then
        has a separate stream. Under ``shard_map`` the layer axis must not be sharded
        over ``axis_name``. None if no leaf is stacked.
      axis_name: under ``shard_map``, the mesh axes that shard the gradient, over which
        norms are summed. A leaf that is not sharded over some of them, by its type,
        counts once. With ``check_vma=False`` types do not show this, and every leaf
        must be sharded over all of them. Leave it None under ``jit``.

    Returns:
      A transformation with state :class:`ClipByThresholdState` and metrics
      ``clip/norm``, ``clip/limit``, ``clip/fraction`` (share of steps clipped),
      ``clip/nonfinite_total`` and, unless the scope is global, ``clip/norm/per_leaf``
      and ``clip/limit/per_leaf``.

    Raises:
      TypeError: ``threshold`` is not a ``Threshold``.
      ValueError: ``scope`` is unknown, or ``stacked`` is given without scope
        ``"leaf"`` or marks a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_stability import thresholds
      >>> tx = clip_by_threshold(thresholds.constant(1.0))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], state.metrics["clip/norm"])
      [0.6 0.8] 5.0
    """
    check_threshold("threshold", threshold)
    _validate.check_axis_name("axis_name", axis_name)
    if not callable(scope):
        _validate.check_choice("scope", scope, ("global", "leaf"))

    per_leaf = scope != "global"
    if stacked is not None and scope != "leaf":
        raise ValueError(
            f"stacked is given, but scope={scope!r} has no limit per layer; "
            "give scope='leaf'."
        )

    def init_fn(params):
        parts = split(_tree.pure(params), scope, stacked)
        streams = jnp.zeros((parts.num_scopes,), jnp.float32)
        size, dtype = parts.num_leaves, _numerics.real_dtype(_tree.pure(params))
        return ClipByThresholdState(
            step=jnp.zeros((), jnp.int32),
            clipped_total=jnp.zeros((), jnp.int32),
            nonfinite_total=jnp.zeros((), jnp.int32),
            norm=jnp.zeros((), dtype),
            limit=jnp.zeros((), dtype),
            leaf_norm=jnp.zeros((size,), dtype) if per_leaf else None,
            leaf_limit=jnp.zeros((size,), dtype) if per_leaf else None,
            threshold=jax.vmap(lambda _: state_for(threshold, dtype))(streams),
            leaves=_tree.mark_leaves(params) if per_leaf else None,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        if (state.leaves is not None) != per_leaf:
            raise _states.WrongStateError(
                f"clip_by_threshold(scope={scope!r}) got the state of another scope; "
                "pass the state of tx.init(params)."
            )
        parts = split(updates, scope, stacked)
        _check_streams(state.threshold, parts)
        norm = scope_norms(updates, parts, axis_name)
        limit, learned = _update_each(threshold, norm, state.threshold)

        finite, above = jnp.isfinite(norm), norm > limit
        # The inner where avoids 0/0 in derivatives.
        factor = jnp.where(above, limit / jnp.where(above, norm, 1.0), 1.0)
        scaled = _scale(updates, factor, finite, parts)
        # They are wider than at init only if the gradient is wider than the parameters.
        norm, limit = norm.astype(state.norm.dtype), limit.astype(state.norm.dtype)
        return scaled, ClipByThresholdState(
            step=_numerics.increment(state.step),
            clipped_total=_count(state.clipped_total, finite & above),
            nonfinite_total=_count(state.nonfinite_total, ~finite),
            norm=_norms.join_norms(norm) if per_leaf else norm[0],
            limit=_norms.join_norms(limit) if per_leaf else limit[0],
            leaf_norm=per_leaf_vector(norm, parts) if per_leaf else None,
            leaf_limit=per_leaf_vector(limit, parts) if per_leaf else None,
            threshold=learned,
            leaves=state.leaves,
        )

    return checked(
        "clip_by_threshold",
        ClipByThresholdState,
        init_fn,
        update_fn,
        stored=(lambda state: state.leaves) if per_leaf else None,
        inexact=True,
    )


def _check_streams(threshold_state: Any, parts: Parts) -> None:
    """Raises unless the gradient has as many scopes as at ``init``."""
    streams = [len(leaf) for leaf in jax.tree.leaves(threshold_state)]
    if any(count != parts.num_scopes for count in streams):
        raise _leaves.WrongLeavesError(
            f"clip_by_threshold: the gradient has {parts.num_scopes} layers or labels, "
            f"which were {streams[0]} at init: a shape or a label changed; make the "
            "state anew with tx.init(params)."
        )


def _update_each(threshold: Threshold, norms, states):
    """Updates one threshold per scope; a single one without a batch axis.

    On a TPU single numbers are for the scalar unit, vectors of one number are not.
    """
    if norms.shape[0] != 1:
        return jax.vmap(functools.partial(learn, threshold))(norms, states)
    found = learn(threshold, norms[0], jax.tree.map(lambda x: x[0], states))
    return jax.tree.map(lambda x: x[None], found)


def _count(total, events):
    return jnp.where(jnp.any(events), _numerics.increment(total), total)
