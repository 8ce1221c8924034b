"""Takes up a checkpoint that was written before these transformations were added.

*Problem*: another chain has another state. Initialised anew it forgets Adam's moments,
and the resumed run jumps.

*Where*: once, on the host, when a run is resumed. *Cost*: that of ``init``.
"""

from typing import Any, NamedTuple

import jax
import optax

from optax_stability._core import _tree


class _Refusal(NamedTuple):
    """Why an old state has no place in a new one.

    Attributes:
      reason: the end of a sentence that begins with "cannot adopt".
      near: whether a state of the same class was there, and only its content differs.
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


def _units(node: Any) -> list[Any]:
    """The states that a chain holds, also in chains within it."""
    return jax.tree.leaves(node, is_leaf=lambda node: not _is_chain(node))


def _children(node: Any) -> list[tuple[str, Any]]:
    """Names and values of what a wrapper's state holds."""
    if hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, dict):
        return list(node.items())
    return []


def _rebuild(node: Any, children: dict[str, Any]) -> Any:
    return type(node)(children) if isinstance(node, dict) else type(node)(**children)


def _graft(new: Any, old: Any) -> Any:
    """The new state with the old one in its place, or a refusal."""
    if _signature(new) == _signature(old):
        return old
    if _is_chain(new):
        return _graft_chain(new, old)
    if type(new) is type(old):
        within = _graft_fields(new, old)
        if not isinstance(within, _Refusal):
            return within
        below = _graft_below(new, old)
        return _named(within, old) if isinstance(below, _Refusal) else below
    return _graft_below(new, old)


def _graft_fields(new: Any, old: Any) -> Any:
    """Two states of one class: each field into the field of its name."""
    old_children, new_children = dict(_children(old)), dict(_children(new))
    if not new_children:
        return _differs(new, old)
    odd = {
        *(name for name, child in old_children.items() if name not in new_children),
        *(
            name
            for name, child in new_children.items()
            # Beside the old ones a new state may stand, but not a new parameter.
            if name not in old_children and hasattr(child, "shape")
        ),
    }
    if odd:
        return _Refusal(f"{min(odd)!r} is in one of the two states only", near=True)
    grafted = {
        name: _graft(child, old_children[name]) if name in old_children else child
        for name, child in new_children.items()
    }
    for name, each in grafted.items():
        if isinstance(each, _Refusal):
            return _Refusal(f"{name}: {each.reason}", near=True)
    return _rebuild(new, grafted)


def _graft_below(new: Any, old: Any) -> Any:
    """A wrapper was put around: the old state into the one child that takes it."""
    found = {name: _graft(child, old) for name, child in _children(new)}
    fits = {n: each for n, each in found.items() if not isinstance(each, _Refusal)}
    if len(fits) > 1:
        return _ambiguous(old)
    if fits:
        return _rebuild(new, dict(_children(new)) | fits)
    return _closest(list(found.values()), old)


def _graft_chain(new: Any, old: Any) -> Any:
    """Every state of the old chain into the one of the new chain that takes it."""
    wholes = _units(new)
    parts = [part for part in _units(old) if jax.tree.leaves(part)]
    together = tuple(parts)
    takers = _takers(wholes, together) if len(parts) > 1 else ()
    # All of them into one, a wrapper around them; or each into its own.
    places = {takers: [together]} if takers else _places(wholes, parts)
    for takers, group in places.items():
        if not takers:
            return _closest([_graft(whole, group[0]) for whole in wholes], group[0])
        if len(takers) == 1:
            group = [group[0] if len(group) == 1 else tuple(group)]
        if len(takers) != len(group):
            return _ambiguous(group[0])
        for place, part in zip(takers, group, strict=True):
            grafted = _graft(wholes[place], part)
            if isinstance(grafted, _Refusal):
                return grafted
            wholes[place] = grafted
    treedef = jax.tree.structure(new, is_leaf=lambda node: not _is_chain(node))
    return jax.tree.unflatten(treedef, wholes)


def _takers(wholes: list[Any], part: Any) -> tuple[int, ...]:
    """The numbers of the new states in which an old one has a place."""
    grafts = [_graft(whole, part) for whole in wholes]
    return tuple(i for i, g in enumerate(grafts) if not isinstance(g, _Refusal))


def _places(wholes: list[Any], parts: list[Any]) -> dict[tuple[int, ...], list[Any]]:
    """Which new states take which old ones.

    Equal ones, such as two schedules, have the same takers; their order tells them
    apart.
    """
    places: dict[tuple[int, ...], list[Any]] = {}
    for part in parts:
        places.setdefault(_takers(wholes, part), []).append(part)
    return places


def _named(refusal: _Refusal, old: Any) -> _Refusal:
    """Says in which state it is, if that has a class of its own."""
    if not hasattr(old, "_fields"):
        return refusal
    return _Refusal(f"{_name(old)}.{refusal.reason}", refusal.near)


def _ambiguous(old: Any) -> _Refusal:
    return _Refusal(
        f"{_name(old)}: it fits in several places of the new state", near=True
    )


def _differs(new: Any, old: Any) -> _Refusal:
    if not (hasattr(old, "shape") and hasattr(new, "shape")):
        return _Refusal(f"{_name(old)}: it has no place in {_name(new)}")
    return _Refusal(
        f"{old.dtype}{list(old.shape)} where the new one has "
        f"{new.dtype}{list(new.shape)}",
        near=True,
    )


def _closest(results: list[Any], old: Any) -> _Refusal:
    """The most telling of several refusals."""
    for each in results:
        if isinstance(each, _Refusal) and each.near:
            return each
    return _Refusal(f"{_name(old)}: the new state has no place for it")


def _check_restored(old_state: Any) -> None:
    """Raises for what a restore without a target, or a failed one, leaves behind."""
    whole = old_state is not None and all(
        hasattr(leaf, "shape") for leaf in jax.tree.leaves(_tree.pure(old_state))
    )
    if not whole:
        raise TypeError(
            f"old_state must be an optimizer state of arrays, got {old_state!r}; "
            "restore it with old_tx.init(params) as the target."
        )


def adopt_state(
    new_tx: optax.GradientTransformation, params: Any, old_state: Any
) -> Any:
    """Makes the state of ``new_tx`` with everything that ``old_state`` knows.

    For a run that goes on with more protection than it began with: the checkpoint holds
    the state of, say, ``optax.adamw``, and the new transformation has something before
    it, behind it or around it. Moments, step counts and schedules go on as they were;
    only what is new starts afresh.

    **Rule**: every state in ``old_state`` goes to the one state of the same class,
    shapes and dtypes in ``new_tx.init(params)``, wherever that is: in a chain,
    in a wrapper, or both. Several equal ones (two schedules) go in their order.

    **Guarantees**

    * All of the old state is taken up, or an error says what has no place. Nothing is
      dropped silently.
    * The arrays are the old ones, with their values, dtypes and shardings.
    * If the new parts are inactive, the next update is the one ``old_tx`` would have
      made, but for the rounding of another program.

    **Edge cases**: old states without arrays (``clip_by_global_norm``) may be missing
    in the new chain. To go from ``optax.adam`` to ``scale_by_safe_adam``, convert the
    Adam state with :func:`from_optax_adam_state` first. From a chain to a
    ``named_chain`` works in the order of its names, if no two states are equal. From
    ``optax.MultiSteps``, between two windows, pass its ``inner_opt_state``.

    Args:
      new_tx: the transformation to go on with.
      params: the parameters, or ``ShapeDtypeStruct`` of them.
      old_state: a state of the old transformation, with its own classes: restore it
        with ``old_tx.init(params)`` as the target. With NNX
        ``nnx.as_pure(optimizer.opt_state)``.

    Returns:
      A state for ``new_tx``.

    Raises:
      ValueError: an old state has no place in the new one, or several.
      TypeError: ``old_state`` is None, or holds something that is no array.

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
    _check_restored(old_state)
    fresh = new_tx.init(params)
    adopted = _graft(_tree.pure(fresh), _tree.pure(old_state))
    if isinstance(adopted, _Refusal):
        raise ValueError(
            f"cannot adopt {adopted.reason}. Every state of the old transformation "
            "needs one place of its class, shapes and dtypes in the new one. Convert "
            "the state of optax.adam with from_optax_adam_state; start from "
            "new_tx.init(params) if the old state is meant to be dropped."
        )
    return adopted
