"""Exchanges the parameters in use with the snapshot of ``branch_on_spike``.

*Cost*: nothing while a run is normal; else one pass over the parameters, and three over
the state of ``inner`` if that is saved too. No temporary copy of a parameter is made.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_stability._core._in_place import (
    apply_if,
    exchange_if,
    measure_if,
    no_hoist,
    run_if,
    select_if,
    write_if,
)
from optax_stability._core._memory_space import Place, put, to_device, to_memory_of
from optax_stability._core._numerics import wide_dtype
from optax_stability._core._platform import by_platform
from optax_stability._spikes._branch_state import Snapshot, Transition
from optax_stability._spikes._detection import DetectorState
from optax_stability._spikes._skip_state import SkipSpikesState


def init_snapshot(
    params: Any, detector: DetectorState, inner_state: Any, keep_in: Place
) -> Snapshot:
    """A snapshot of zeros, sharded as its arguments are; () takes no memory."""
    zeros = optax.tree.zeros_like
    return Snapshot(
        put(zeros(params), keep_in), detector, put(zeros(inner_state), keep_in)
    )


def _first_moment_fields(node: Any) -> tuple[str, ...]:
    """The names of the fields of a state that hold a first moment."""
    if isinstance(node, optax.TraceState):
        return ("trace",)
    fields = getattr(type(node), "_fields", ())
    return ("mu",) if isinstance(node, tuple) and "mu" in fields else ()


def _reset_first_moments(reset, inner_state: Any) -> Any:
    """The state, with all first moments set to 0 if ``reset`` holds."""

    def reset_node(node):
        for name in _first_moment_fields(node):
            moment = getattr(node, name)
            zeros = optax.tree.zeros_like(moment)
            node = node._replace(**{name: optax.tree.where(reset, zeros, moment)})
        return node

    return jax.tree.map(
        reset_node, inner_state, is_leaf=lambda x: bool(_first_moment_fields(x))
    )


def _to_memory_of(tree, other):
    """The tree, moved to the memory of ``other``, which may be that of the host."""
    return jax.tree.map(to_memory_of, tree, other)


def _update_to(kept, params, like):
    """The update that turns ``params`` into ``kept``."""
    kept, wide = to_device(kept), wide_dtype(kept)
    return (kept.astype(wide) - params.astype(wide)).astype(like.dtype)


def _dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _swap_params(run, taken, updates, params, kept):
    """Exchanges the parameters and the kept ones, if ``run`` holds.

    Where the dtypes agree nothing is copied: update and kept parameters exchange their
    buffers.

    Returns:
      The update that turns ``params`` into ``kept``, and the new kept parameters:
      ``params`` after their own update, if it is ``taken``.
    """

    def apply_update(update, p, like):
        update = jnp.where(taken, to_device(update), 0)
        return to_memory_of(optax.apply_updates(p, update), like)

    def updated_params(updates, kept):
        return jax.tree.map(apply_update, updates, params, kept)

    def updates_to(kept, updates):
        return jax.tree.map(_update_to, kept, params, updates)

    if _dtypes(updates) != _dtypes(kept):
        return run_if(
            run,
            lambda pair: (updates_to(pair[1], pair[0]), updated_params(*pair)),
            (updates, kept),
        )
    old, update = exchange_if(run, updates, kept)
    kept = run_if(run, lambda update: updated_params(update, update), update)
    # ``kept`` passes through for its data dependency: XLA then reads the parameters for
    # both results before it updates them.
    return run_if(
        run,
        lambda pair: (updates_to(pair[0], pair[0]), no_hoist(pair[1])),
        (old, kept),
    )


class _Job(NamedTuple):
    """What a step of ``branch_on_spike`` changes.

    Attributes:
      updates: the gradient, then the update.
      inner_state: state of ``inner``.
      snapshot: the snapshot; its ``inner_state`` is () if that of ``inner`` is not
        saved.
    """

    updates: Any
    inner_state: Any
    snapshot: Snapshot


def _apply_in_place(transition: Transition, take, step, params, job: _Job) -> _Job:
    """Takes a snapshot if a branch opens, takes the step, and exchanges parameters."""
    updates, inner_state, snapshot = job
    saves_state = bool(jax.tree.leaves(snapshot.inner_state))
    kept_params = run_if(
        transition.opens, lambda old: _to_memory_of(params, old), snapshot.params
    )
    kept_state = snapshot.inner_state
    if saves_state:
        inner_state, kept_state = measure_if(
            transition.opens,
            lambda now, _, old: _to_memory_of(now, old),
            *(inner_state, (), kept_state),
        )

    def update_and_keep(updates, carry):
        inner_state, kept_params = carry
        if not saves_state:
            inner_state = _reset_first_moments(transition.rolls_back, inner_state)
        updates, inner_state = step(updates, inner_state)
        return updates, (inner_state, kept_params)

    written, (inner_state, kept_params) = write_if(
        take, update_and_keep, updates, (inner_state, kept_params)
    )
    targets, kept_params = _swap_params(
        transition.swaps, take, written.targets, params, kept_params
    )
    if saves_state:
        inner_state, kept_state = exchange_if(transition.swaps, inner_state, kept_state)
    return _Job(
        updates=written._replace(targets=targets).updates(take | transition.swaps),
        inner_state=inner_state,
        snapshot=snapshot._replace(params=kept_params, inner_state=kept_state),
    )


def _apply_if_asked(transition: Transition, take, step, params, job: _Job) -> _Job:
    """The same for accelerators: what is rare under one condition, all else selected.

    ``inner`` is compiled twice: in a rare step its update has to be in memory, where it
    changes places with the snapshot; in all others it is part of the pass that applies
    it.
    """
    rare = transition.opens | transition.swaps
    outputs = jax.eval_shape(step, job.updates, job.inner_state)[0]
    # An update is written over its gradient where they have the same dtype.
    targets = jax.tree.map(
        lambda g, u: g if g.dtype == u.dtype else jnp.zeros_like(g, dtype=u.dtype),
        job.updates,
        outputs,
    )

    def gradient(targets):
        return jax.tree.map(
            lambda t, g: t if t.dtype == g.dtype else g, targets, job.updates
        )

    def apply(job):
        job = job._replace(updates=gradient(job.updates))
        return _apply_in_place(transition, take, step, params, job)

    targets, inner_state, snapshot = run_if(rare, apply, job._replace(updates=targets))

    def ordinary(updates, inner_state):
        if not jax.tree.leaves(snapshot.inner_state):
            inner_state = _reset_first_moments(transition.rolls_back, inner_state)
        return step(updates, inner_state)

    updates, _, inner_state = apply_if(
        take & ~rare, ordinary, gradient(targets), inner_state, select_if
    )
    return _Job(optax.tree.where(rare, targets, updates), inner_state, snapshot)


def apply_transition(
    transition: Transition,
    take,
    step,
    updates,
    params,
    inner_state,
    snapshot: Snapshot,
):
    """Takes a snapshot if a branch opens, takes the step, and exchanges parameters.

    Args:
      transition: how the step changes the mode.
      take: bool[] – whether the step is taken.
      step: function from the gradient and the state of ``inner`` to the update and the
        next state.
      updates: the gradient.
      params: the parameters in use.
      inner_state: state of ``inner``.
      snapshot: the snapshot; its ``inner_state`` is () if that of ``inner`` is not
        saved.

    Returns:
      The update, the state of ``inner``, and the snapshot with its old detector.
    """

    def apply(how):
        return lambda params, job: how(transition, take, step, params, job)

    job = _Job(updates, inner_state, snapshot)
    return by_platform(
        params, job, cpu=apply(_apply_in_place), accelerator=apply(_apply_if_asked)
    )


def exchange_detectors(
    transition: Transition,
    before: DetectorState,
    skip: SkipSpikesState,
    snapshot: Snapshot,
) -> tuple[SkipSpikesState, Snapshot]:
    """Does the same for the state of the detector, a few scalars.

    If a branch opens, the snapshot gets ``before``, the state from before the step.
    """
    where = optax.tree.where
    in_use = where(transition.swaps, snapshot.detector, skip.detector)
    kept = where(transition.opens, before, snapshot.detector)
    kept = where(transition.swaps, skip.detector, kept)
    return skip._replace(detector=in_use), snapshot._replace(detector=kept)
