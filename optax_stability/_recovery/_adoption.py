"""Adopts a checkpoint that was written before these transformations were added.

*Problem*: a different chain has a different state. A freshly initialised state has lost
Adam's moments, and the loss of the resumed run jumps.

*Where*: once, on the host, when a run is resumed. *Cost*: that of ``init``.
"""

from typing import Any, NamedTuple

import jax
import optax

from optax_stability._core import _states, _tree, _validate


class _Refusal(NamedTuple):
    """Why an old state does not fit into a new one.

    Attributes:
      reason: the end of a sentence that begins with "cannot adopt".
      near: whether there is a state of the same class, and only its content differs.
    """

    reason: str
    near: bool = False


def _is_chain(node: Any) -> bool:
    """Whether a node is the state of ``optax.chain``: a plain tuple."""
    return type(node) is tuple


def _signature(node: Any):
    leaves, treedef = jax.tree.flatten(node)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _name(node: Any) -> str:
    return "the chain" if _is_chain(node) else type(node).__name__


def _chain_members(node: Any) -> list[Any]:
    """The states in a chain, those of nested chains included."""
    return jax.tree.leaves(node, is_leaf=lambda node: not _is_chain(node))


def _children(node: Any) -> list[tuple[str, Any]]:
    """Names and values of the fields of a wrapper's state."""
    if hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, dict):
        return list(node.items())
    return []


def _rebuild(node: Any, children: dict[str, Any]) -> Any:
    return type(node)(children) if isinstance(node, dict) else type(node)(**children)


def _graft(new: Any, old: Any) -> Any:
    """The new state with the old one inserted, or a refusal."""
    if _signature(new) == _signature(old):
        return old
    if _is_chain(new):
        return _graft_chain(new, old)
    if type(new) is type(old):
        by_field = _graft_fields(new, old)
        if not isinstance(by_field, _Refusal):
            return by_field
        wrapped = _graft_into_child(new, old)
        return _add_name(by_field, old) if isinstance(wrapped, _Refusal) else wrapped
    return _graft_into_child(new, old)


def _graft_fields(new: Any, old: Any) -> Any:
    """Two states of one class: each field goes into the field of the same name."""
    old_children, new_children = dict(_children(old)), dict(_children(new))
    if not new_children:
        return _mismatch(new, old)
    unmatched = {
        *(name for name, child in old_children.items() if name not in new_children),
        *(
            name
            for name, child in new_children.items()
            # The new state may have additional states, but no additional parameters.
            if name not in old_children and hasattr(child, "shape")
        ),
    }
    if unmatched:
        return _Refusal(
            f"{min(unmatched)!r} is in only one of the two states", near=True
        )
    grafted = {
        name: _graft(child, old_children[name]) if name in old_children else child
        for name, child in new_children.items()
    }
    for name, each in grafted.items():
        if isinstance(each, _Refusal):
            return _Refusal(f"{name}: {each.reason}", near=True)
    return _rebuild(new, grafted)


def _graft_into_child(new: Any, old: Any) -> Any:
    """A new wrapper: the old state goes into the one child that accepts it."""
    found = {name: _graft(child, old) for name, child in _children(new)}
    fits = {n: each for n, each in found.items() if not isinstance(each, _Refusal)}
    if len(fits) > 1:
        return _ambiguous(old)
    if fits:
        return _rebuild(new, dict(_children(new)) | fits)
    return _most_specific(list(found.values()), old)


def _graft_chain(new: Any, old: Any) -> Any:
    """Each state of the old chain goes into the new state that accepts it."""
    new_states = _chain_members(new)
    old_states = [state for state in _chain_members(old) if jax.tree.leaves(state)]
    old_chain = tuple(old_states)
    matches = _matches(new_states, old_chain) if len(old_states) > 1 else ()
    # Either all go into one new state, a wrapper around the old chain, or each into its
    # own.
    groups = (
        {matches: [old_chain]} if matches else _group_by_matches(new_states, old_states)
    )
    for matches, group in groups.items():
        if not matches:
            refusals = [_graft(state, group[0]) for state in new_states]
            return _most_specific(refusals, group[0])
        if len(matches) == 1:
            group = [group[0] if len(group) == 1 else tuple(group)]
        if len(matches) != len(group):
            return _ambiguous(group[0])
        for i, state in zip(matches, group, strict=True):
            grafted = _graft(new_states[i], state)
            if isinstance(grafted, _Refusal):
                return grafted
            new_states[i] = grafted
    treedef = jax.tree.structure(new, is_leaf=lambda node: not _is_chain(node))
    return jax.tree.unflatten(treedef, new_states)


def _matches(new_states: list[Any], old: Any) -> tuple[int, ...]:
    """The indices of the new states that accept an old one."""
    grafts = [_graft(state, old) for state in new_states]
    return tuple(i for i, g in enumerate(grafts) if not isinstance(g, _Refusal))


def _group_by_matches(
    new_states: list[Any], old_states: list[Any]
) -> dict[tuple[int, ...], list[Any]]:
    """The old states, grouped by the new states that accept them.

    Equal states, such as two schedules, have the same matches; they are assigned in
    their order.
    """
    groups: dict[tuple[int, ...], list[Any]] = {}
    for state in old_states:
        groups.setdefault(_matches(new_states, state), []).append(state)
    return groups


def _add_name(refusal: _Refusal, old: Any) -> _Refusal:
    """Adds the name of the state, if it has its own class."""
    if not hasattr(old, "_fields"):
        return refusal
    return _Refusal(f"{_name(old)}.{refusal.reason}", refusal.near)


def _ambiguous(old: Any) -> _Refusal:
    return _Refusal(
        f"{_name(old)}: it fits in several places of the new state", near=True
    )


def _mismatch(new: Any, old: Any) -> _Refusal:
    if not (hasattr(old, "shape") and hasattr(new, "shape")):
        return _Refusal(f"{_name(old)}: it has no place in {_name(new)}")
    remedy = ""
    if new.shape == old.shape:
        remedy = f" (for moments give mu_dtype or rms_dtype={old.dtype.name!r})"
    return _Refusal(
        f"{old.dtype}{list(old.shape)} where the new one has "
        f"{new.dtype}{list(new.shape)}{remedy}",
        near=True,
    )


def _most_specific(results: list[Any], old: Any) -> _Refusal:
    """The most specific of several refusals."""
    for each in results:
        if isinstance(each, _Refusal) and each.near:
            return each
    return _Refusal(f"{_name(old)}: the new state has no place for it")


def _check_restored(old_state: Any) -> None:
    """Raises for None or a non-array: the restore failed, or had no target."""
    complete = old_state is not None and all(
        hasattr(leaf, "shape") for leaf in jax.tree.leaves(_tree.pure(old_state))
    )
    if not complete:
        raise TypeError(
            f"old_state must be an optimizer state of arrays, got {old_state!r}; "
            "restore it with old_tx.init(params) as the target."
        )


def adopt_state(
    new_tx: optax.GradientTransformation, params: Any, old_state: Any
) -> optax.OptState:
    """Makes a state of ``new_tx`` that contains all of ``old_state``.

    Use it to add protection to a running job: the checkpoint holds the state of, say,
    ``optax.adamw``, and the new transformation adds something before, after or around
    it. Moments, step counts and schedules continue; only the new states are fresh.

    **Rule**: every state in ``old_state`` replaces the one state of the same class,
    shapes and dtypes in ``new_tx.init(params)``, wherever that is: in a chain, in a
    wrapper, or both. Several equal states (two schedules) are assigned in their order.

    **Guarantees**

    * All of the old state is adopted, or an error names the part that does not fit.
      Nothing is dropped silently.
    * The arrays are the old ones, with their values, dtypes and shardings.
    * If the new parts are inactive, the next update is the one that ``old_tx`` would
      have made, up to the rounding of a different program.

    **Edge cases**: old states without arrays (``clip_by_global_norm``) may be missing
    in the new chain. To go from ``optax.adam`` to ``scale_by_safe_adam``, convert the
    Adam state with :func:`from_optax_adam_state` first. A chain can become a
    ``named_chain``, in the order of its names, if no two states are equal. From
    ``optax.MultiSteps``, between two windows, pass its ``inner_opt_state``.

    Args:
      new_tx: the transformation to continue with.
      params: the parameters, or ``ShapeDtypeStruct`` of them.
      old_state: a state of the old transformation, with its own classes: restore it
        with ``old_tx.init(params)`` as the target. With NNX
        ``nnx.as_pure(optimizer.opt_state)``.

    Returns:
      A state for ``new_tx``.

    Raises:
      ValueError: an old state fits nowhere in the new one, or in several places.
      TypeError: ``old_state`` is None, or holds a leaf that is not an array.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_stability import clip_by_zscore, skip_spikes
      >>> params, old_tx = {"w": jnp.ones(3)}, optax.adamw(1e-3)
      >>> _, old_state = old_tx.update(params, old_tx.init(params), params)
      >>> tx = skip_spikes(optax.chain(clip_by_zscore(), old_tx))
      >>> state = adopt_state(tx, params, old_state)
      >>> print(state.inner_state[1][0].mu["w"])
      [0.1 0.1 0.1]
    """
    _validate.check_transformation("new_tx", new_tx)
    _states.check_not_transformation(old_state)
    _check_restored(old_state)
    fresh = new_tx.init(params)
    adopted = _graft(_tree.pure(fresh), _tree.pure(old_state))
    if isinstance(adopted, _Refusal):
        raise ValueError(
            f"cannot adopt {adopted.reason}. Every state of the old transformation "
            "needs one place of its class, shapes and dtypes in the new one. Convert "
            "the state of optax.adam with from_optax_adam_state; to drop the old "
            "state, start from new_tx.init(params)."
        )
    return adopted
