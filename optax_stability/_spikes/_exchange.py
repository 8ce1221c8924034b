"""What ``branch_on_spike`` uses and what it keeps aside change places.

*Cost*: nothing while a run is normal; else a pass over the parameters, and three over
the state of ``inner`` if that is kept too. Nothing the size of a parameter is copied in
between.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_stability._core._in_place import (
    exchange_if,
    measure_if,
    no_hoist,
    run_if,
    write_if,
)
from optax_stability._core._memory_space import Place, put, to_device, to_memory_of
from optax_stability._spikes._branch_state import Kept, Transition
from optax_stability._spikes._detection import DetectorState
from optax_stability._spikes._skip_state import SkipSpikesState


def init_kept(
    params: Any, detector: DetectorState, inner_state: Any, keep_in: Place
) -> Kept:
    """Room for what is kept, sharded as what it is a copy of; () needs none."""
    room = optax.tree.zeros_like
    return Kept(put(room(params), keep_in), detector, put(room(inner_state), keep_in))


def _momentum_of(node: Any) -> tuple[str, ...]:
    """The fields of a state that hold a first moment."""
    if isinstance(node, optax.TraceState):
        return ("trace",)
    fields = getattr(type(node), "_fields", ())
    return ("mu",) if isinstance(node, tuple) and "mu" in fields else ()


def _without_momentum(drop, inner_state: Any) -> Any:
    """The state with first moments of 0 if ``drop`` holds."""

    def without(node):
        for name in _momentum_of(node):
            moment = getattr(node, name)
            none = optax.tree.zeros_like(moment)
            node = node._replace(**{name: optax.tree.where(drop, none, moment)})
        return node

    return jax.tree.map(without, inner_state, is_leaf=lambda x: bool(_momentum_of(x)))


def _to_memory_of(tree, other):
    """A tree where the other lies, which may be in the memory of the host."""
    return jax.tree.map(to_memory_of, tree, other)


def _update_to(kept, params, like):
    """The update that turns ``params`` into ``kept``."""
    kept, wide = to_device(kept), jnp.promote_types(kept.dtype, jnp.float32)
    return (kept.astype(wide) - params.astype(wide)).astype(like.dtype)


def _dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _swap_params(run, took, updates, params, kept):
    """The update to the kept parameters; kept are those in use, after their own update.

    Where dtypes agree nothing is copied: update and kept parameters change places.
    """

    def updated(update, p, like):
        update = jnp.where(took, to_device(update), 0)
        return to_memory_of(optax.apply_updates(p, update), like)

    def after(updates, kept):
        return jax.tree.map(updated, updates, params, kept)

    def back(kept, updates):
        return jax.tree.map(_update_to, kept, params, updates)

    if _dtypes(updates) != _dtypes(kept):
        return run_if(
            run,
            lambda pair: (back(pair[1], pair[0]), after(*pair)),
            (updates, kept),
        )
    old, update = exchange_if(run, updates, kept)
    kept = run_if(run, lambda update: after(update, update), update)
    # What is kept passes: all have read the parameters before they are updated.
    return run_if(
        run, lambda pair: (back(pair[0], pair[0]), no_hoist(pair[1])), (old, kept)
    )


def apply_transition(
    transition: Transition, take, step, updates, params, inner_state, kept: Kept
):
    """Takes the step, exchanges parameters, and keeps what a branch begins from.

    Args:
      transition: what the step does to the mode.
      take: bool[] – whether the step is taken.
      step: from the gradient and the state of ``inner`` to the update and the next.
      updates: the gradient.
      params: the parameters in use.
      inner_state: state of ``inner``.
      kept: what is kept; its ``inner_state`` is empty if that of ``inner`` is not.

    Returns:
      The update, the state of ``inner``, and what is kept with the old detector.
    """
    whole = bool(jax.tree.leaves(kept.inner_state))
    kept_params = run_if(
        transition.opens, lambda old: _to_memory_of(params, old), kept.params
    )
    kept_state = kept.inner_state
    if whole:
        inner_state, kept_state = measure_if(
            transition.opens,
            lambda now, _, old: _to_memory_of(now, old),
            *(inner_state, (), kept_state),
        )

    def update_and_keep(updates, carry):
        inner_state, kept_params = carry
        if not whole:
            inner_state = _without_momentum(transition.rolls_back, inner_state)
        updates, inner_state = step(updates, inner_state)
        return updates, (inner_state, kept_params)

    written, (inner_state, kept_params) = write_if(
        take, update_and_keep, updates, (inner_state, kept_params)
    )
    targets, kept_params = _swap_params(
        transition.swaps, take, written.targets, params, kept_params
    )
    if whole:
        inner_state, kept_state = exchange_if(transition.swaps, inner_state, kept_state)
    kept = kept._replace(params=kept_params, inner_state=kept_state)
    updates = written._replace(targets=targets).updates(take | transition.swaps)
    return updates, inner_state, kept


def exchange_detectors(
    transition: Transition, before: DetectorState, skip: SkipSpikesState, kept: Kept
) -> tuple[SkipSpikesState, Kept]:
    """The same with what the thresholds had learned before the step: a few scalars."""
    where = optax.tree.where
    now = where(transition.swaps, kept.detector, skip.detector)
    aside = where(
        transition.swaps, skip.detector, where(transition.opens, before, kept.detector)
    )
    return skip._replace(detector=now), kept._replace(detector=aside)
