"""Turns a transformation into a small tree of named parts, which rules can read.

*Problem*: a transformation is a pair of closures. It does not say what it is, nor what
it is made of.

*How*: the functions of a transformation are defined inside the factory that made it, so
their qualified name begins with the name of the factory, and their closure holds the
arguments, other transformations among them. Both are ordinary introspection of Python;
no private module is imported. What is not found this way is a part that no rule knows.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

_LIBRARIES = ("optax", "optax_stability")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One transformation in a chain; two parts are equal only if they are the same.

    Attributes:
      name: name of the factory that made it, ``"scale_by_adam"``.
      known: whether the factory is one of optax or of this library.
      takes_extra_args: whether its ``update`` takes arguments such as ``value=``.
      arguments: what the factory keeps of its arguments, by name.
      parts: the transformations that it is made of.
    """

    name: str
    known: bool
    takes_extra_args: bool
    arguments: Mapping[str, Any]
    parts: tuple["Part", ...]


def describe(tx: Any, params: Any = None) -> Part:
    """The tree of parts of a transformation.

    Args:
      tx: anything with ``init`` and ``update``.
      params: the parameters; a group of ``optax.partition`` that none of them belongs
        to is left out. With None all groups are there.
    """
    return _describe(tx, params, frozenset())


def _describe(tx: Any, params: Any, around: frozenset[int]) -> Part:
    """The same, without what is around it already: a closure may hold itself."""
    update = _unwrap(tx.update)
    name = getattr(update, "__qualname__", type(update).__name__).split(".")[0]
    module = getattr(update, "__module__", None) or ""
    known = module.split(".")[0] in _LIBRARIES
    arguments = _arguments(tx.init) | _arguments(tx.update)
    if known and name == "with_extra_args_support":
        # It is put around what is declared to take no extra arguments.
        part = _describe(arguments["tx"], params, around)
        return dataclasses.replace(part, takes_extra_args=False)
    children = _children(name, arguments, params) if known else arguments.values()
    around |= {_identity(tx)}
    return Part(
        name=name,
        known=known,
        takes_extra_args=_takes_extra_args(tx.update),
        arguments=arguments,
        parts=tuple(
            _describe(child, params, around)
            for child in _transformations(children)
            if _identity(child) not in around
        ),
    )


def _identity(tx: Any) -> int:
    """The same number for the same transformation, a bound method included."""
    return id(getattr(tx.update, "__self__", tx.update))


def _unwrap(function: Any) -> Any:
    """The function behind ``functools.partial``, ``jax.jit`` and other decorators."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)


def _arguments(function: Any) -> dict[str, Any]:
    """The variables that a function keeps, or the attributes of a method's object."""
    function = _unwrap(function)
    if inspect.ismethod(function):
        return dict(getattr(function.__self__, "__dict__", {}))
    if not inspect.isfunction(function):
        return {}
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except ValueError:  # A variable that is not assigned yet.
        return {}


def _takes_extra_args(update: Callable) -> bool:
    """Whether ``update`` takes keywords that it does not name; True if not known."""
    try:
        parameters = inspect.signature(update).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def _children(name: str, arguments: Mapping[str, Any], params: Any) -> Any:
    """What to look for transformations in."""
    if name == "monitor":  # Its measures see the gradient, and do not change it.
        return ()
    if name == "chain":
        pairs = zip(arguments["init_fns"], arguments["update_fns"], strict=True)
        return [optax.GradientTransformationExtraArgs(*pair) for pair in pairs]
    if name == "partition":
        return _used_groups(arguments["transforms"], arguments["param_labels"], params)
    if name == "inject_hyperparams":
        return _injected(arguments)
    return arguments.values()


def _used_groups(transforms: Mapping, labels: Any, params: Any) -> list[Any]:
    """The transformations of the groups that hold a parameter, or all of them."""
    if params is None:
        return list(transforms.values())
    labels = _try(labels, params) if callable(labels) else labels
    used = {label for label in jax.tree.leaves(labels) if label in transforms}
    return [tx for label, tx in transforms.items() if not used or label in used]


def _injected(arguments: Mapping[str, Any]) -> list[Any]:
    """What ``optax.inject_hyperparams`` makes at each step, with constants."""
    scheduled = dict.fromkeys(arguments["sched_hps"], 1.0)
    constants = arguments["numeric_hps"] | arguments["other_hps"] | scheduled
    return [_try(arguments["inner_factory"], **constants)]


def _try(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result of a function of the user, or None: a check never fails for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception:
            return None


def _transformations(values: Any) -> Iterator[Any]:
    """Each transformation among the values once, also in tuples, lists and dicts."""
    seen = set()
    for each in _flatten(values):
        if id(each) not in seen:
            seen.add(id(each))
            yield each


def _flatten(values: Any) -> Iterator[Any]:
    for each in values:
        if isinstance(each, optax.GradientTransformation | optax.MultiSteps):
            yield each
        elif isinstance(each, Mapping):
            yield from _flatten(each.values())
        elif isinstance(each, tuple | list):
            yield from _flatten(each)
