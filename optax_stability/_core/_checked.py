"""The checks that every transformation makes of what it is called with.

*Problem*: the state of another optimizer, a leaf that was added after ``init`` or a
gradient with respect to integers fail far inside, or give a wrong number.

*How*: :func:`checked` wraps ``init`` and ``update``. A mistake raises one sentence
with the leaf or argument, its value and the remedy.

*Cost*: none at run time; while tracing, one pass over the structure of the trees.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_stability._core import _leaves, _states

_ANY = AttributeError, IndexError, KeyError, TypeError, ValueError


def _fresh_state(init_fn: Callable[[Any], Any], like: Any) -> Any:
    """The shapes of a fresh state; None if ``like`` is not what ``init`` takes."""
    try:
        return jax.eval_shape(init_fn, like)
    except _ANY:
        return None


def checked(
    name: str,
    kind: type,
    init_fn: Callable[[Any], Any],
    update_fn: Callable[..., Any],
    *,
    stored: Callable[[Any], Any] | None = None,
    inexact: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose ``init`` and ``update`` check what they are given.

    Plain numbers and NumPy arrays become JAX arrays.

    Args:
      name: of the public function, for messages.
      kind: class of its state.
      init_fn: from parameters to the state.
      update_fn: from gradient, state, parameters and extra arguments to both.
      stored: from the state to the tree that has one entry per leaf of the gradient:
        arrays of the same shapes, or marks. None, or a function that returns None, if
        there is no such tree.
      inexact: whether the gradient is scaled or averaged, so that integers are refused;
        with ``stored`` already at ``init``.
    """

    @functools.wraps(init_fn)
    def init(params):
        params = _leaves.as_arrays(f"{name}: params", params)
        if inexact and stored is not None:
            _leaves.check_inexact(f"{name}: params", params)
        return init_fn(params)

    @functools.wraps(update_fn)
    def update(updates, state, params=None, **extra_args):
        place = f"{name}: the gradient"
        _states.check_state(name, state, kind)
        updates = _leaves.as_arrays(place, updates)
        known = None if stored is None else stored(state)
        if known is not None:
            _leaves.check_leaves(place, known, updates)
        if inexact:
            _leaves.check_inexact(place, updates)
        try:
            return update_fn(updates, state, params, **extra_args)
        except (_states.WrongStateError, _leaves.WrongLeavesError):
            raise
        except _ANY as error:
            # Only now, because this traces init once more.
            fresh = _fresh_state(init_fn, updates if params is None else params)
            if fresh is not None:
                _states.check_layout(name, state, fresh, error)
            raise

    return optax.GradientTransformationExtraArgs(init, update)
