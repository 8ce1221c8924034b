"""Which nodes are states of this library, and whether a state can be used as it is.

A class of states is marked by the class attribute ``reports_metrics = True``. A field
called ``metrics`` is no mark: states of other libraries have such fields, too.

*Cost*: none at run time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_reporting(node: Any) -> bool:
    """Whether a node is a state whose ``metrics`` are read."""
    return isinstance(node, tuple) and getattr(type(node), "reports_metrics", False)


class WrongStateError(TypeError):
    """The state of another transformation was given."""


def _describe(state: Any) -> str:
    """The class of a state; for a chain, the classes of its members."""
    if type(state) is tuple and state:
        return f"a chain of {', '.join(type(each).__name__ for each in state)}"
    return f"a {type(state).__name__}" if state is not None else "None"


def check_not_transformation(state: Any) -> None:
    """Raises TypeError if a transformation was given in place of its state."""
    is_one = isinstance(state, optax.GradientTransformation)
    if is_one or (hasattr(state, "init") and hasattr(state, "update")):
        raise TypeError(
            f"state must be an optimizer state, got the transformation itself, a "
            f"{type(state).__name__}; pass the state that tx.init(params) or "
            "tx.update(...) returned."
        )


def check_single(state: Any) -> None:
    """Raises ValueError if a state of ours has a leading axis, as ``pmap`` wants it.

    ``step`` is one number in a state, or the field that the class attribute ``number``
    names.
    """
    name = getattr(type(state), "number", "step")
    shape = jnp.shape(getattr(state, name, 0))
    if shape != ():
        raise ValueError(
            f"{type(state).__name__}.{name} has the shape {shape} in place of (): the "
            "state was replicated for pmap or stacked by vmap. Pass the state of one "
            "device, jax.tree.map(lambda x: x[0], state), or make the call inside pmap "
            "or vmap."
        )


def check_state(name: str, state: Any, kind: type) -> None:
    """Raises unless ``state`` is a single state of ``kind``, which ``name`` made."""
    if not isinstance(state, kind):
        raise WrongStateError(
            f"{name} got {_describe(state)} in place of its {kind.__name__}: a state "
            "belongs to the transformation that made it. Pass the state of "
            "tx.init(params); to continue a run with another transformation, use "
            "adopt_state(tx, params, old_state)."
        )
    check_single(state)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def check_layout(name: str, state: Any, fresh: Any, error: Exception) -> None:
    """Explains ``error`` if a state has not the leaves and shapes of a fresh one.

    Raises:
      WrongStateError: it has others, which is where ``error`` came from.
    """
    has, needs = _shapes(state), _shapes(fresh)
    if jax.tree.structure(state) == jax.tree.structure(fresh) and has == needs:
        return
    extra = [path for path in has if has[path] != needs.get(path)]
    missing = [path for path in needs if path not in has]
    where = ""
    if extra:
        where = f" (it has {extra[0]} of shape {has[extra[0]]})"
    elif missing:
        where = f" (it lacks {missing[0]} of shape {needs[missing[0]]})"
    raise WrongStateError(
        f"{name} got a state that another {name} made{where}: with other arguments, or "
        "around another transformation. Pass the state of tx.init(params); to continue "
        "a run with another transformation, use adopt_state(tx, params, old_state)."
    ) from error
