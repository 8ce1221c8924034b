"""Argument checks, in one place: every message shows name, value and remedy.

Only *concrete* numbers are checked. A traced value (``optax.inject_hyperparams``) or an
array passes, because its value is unknown when the transformation is created.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether ``value`` is a plain number, whose value can be read now."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_numbers(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a number, an array or a tracer."""
    if not is_concrete(value) and not isinstance(value, jax.Array | np.ndarray):
        remedy = (
            f"; to schedule {name}, use optax.inject_hyperparams"
            if callable(value)
            else ""
        )
        raise TypeError(f"{name} must be a number, got {name}={value!r}{remedy}.")


def check_number(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number, or an array or tracer of one number."""
    check_numbers(name, value)
    if not is_concrete(value) and value.shape != ():
        raise ValueError(
            f"{name} must be one number, got an array of the shape {value.shape}; give "
            f"{name} as a float or an array of the shape ()."
        )


def check_interval(
    name: str,
    value: Any,
    interval: str,
    remedy: str,
) -> None:
    """Raises unless ``value`` lies in ``interval``, written ``"[0, 1)"``."""
    check_number(name, value)
    if not is_concrete(value):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name}={value!r} is outside {interval}; {remedy}.")


def check_count(name: str, value: Any, minimum: int, remedy: str) -> None:
    """Raises unless ``value`` is an integer of at least ``minimum``."""
    check_number(name, value)
    if not is_concrete(value):
        return
    if not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(
            f"{name}={value!r} must be an integer of at least {minimum}; {remedy}."
        )


def check_size(name: str, value: Any, minimum: int) -> None:
    """Raises unless ``value`` is a plain integer of at least ``minimum``."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is the size of an array and must be a plain int, got an array; "
            f"under optax.inject_hyperparams add static_args={name!r}."
        )
    check_count(name, value, minimum, "it is the size of an array")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is unknown; choose one of {listed}.")


def check_rate(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number of at least 0, or a schedule of one."""
    if not callable(value):
        remedy = "give a number such as 1e-3, or a schedule"
        check_interval(name, value, "[0, inf)", remedy)


def check_flags(**flags: Any) -> None:
    """Raises TypeError unless every argument, by name, is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{name} must be True or False, got {name}={value!r}; it is read when "
                "the function is called, so it cannot be an array."
            )


def check_callable(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function, got {name}={value!r}; pass the function "
            "itself, not its result."
        )


def check_axis_name(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` names mesh axes, or is None."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(each, str) for each in names):
        raise TypeError(
            f"{name} must be the name of a mesh axis, a tuple of names, or None, got "
            f"{name}={value!r}; give the names that shard_map knows, such as 'data'."
        )


def check_transformation(name: str, tx: Any) -> None:
    """Raises TypeError unless ``tx`` has the two functions of a transformation.

    A threshold has them as well, and a third one.
    """
    has_both = hasattr(tx, "init") and hasattr(tx, "update")
    if not has_both or hasattr(tx, "rebase"):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {tx!r}; pass "
            "the result of a call, such as optax.adamw(1e-3)."
        )


def check_float_dtype(name: str, dtype: Any, *, optional: bool = False) -> None:
    """Raises unless ``dtype`` is a floating-point dtype, or None where it may be."""
    if optional and dtype is None:
        return
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{name} must be a dtype, got an array; under optax.inject_hyperparams add "
            f"static_args={name!r}."
        )
    try:
        is_float = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (TypeError, ValueError):
        is_float = False
    if not is_float:
        raise ValueError(
            f"{name}={dtype!r} must be a floating-point dtype, such as jnp.float32."
        )


def as_float32(value: Any) -> Any:
    """A plain float, or an array as float32 (``inject_hyperparams`` may hold bf16)."""
    return float(value) if is_concrete(value) else jnp.asarray(value, jnp.float32)
