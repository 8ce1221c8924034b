"""The interface of all thresholds, and the constant threshold.

*Problem*: a fixed limit such as 1.0 fits one model at one stage of training. Whether a
norm is large depends on the norms before it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from optax_stability._core import _numerics, _validate

P = ParamSpec("P")


class Threshold(NamedTuple):
    """Computes the limit of normal values from the past values of a stream.

    Its ``repr`` is the call that created it: ``detrended_mad(5.0, floor=5.0)``.

    Attributes:
      init: ``init() -> state``, in float32. For a stream of float64 numbers the caller
        casts the state to float64.
      update: ``update(x, state) -> (limit, state)`` – the limit for ``x``, in the dtype
        of the state, computed from past values, and the state after ``x`` is learned.
        The caller decides whether to keep the new state.
      rebase: ``rebase(x, state) -> state`` – restarts from the present level ``x``.
      call: str – the ``repr``; if it is empty, the ``repr`` shows the functions.

    Example:
      >>> from optax_stability import thresholds
      >>> threshold = thresholds.window_median(2.0, window=4)
      >>> state = threshold.init()
      >>> for norm in (1.0, 1.2, 50.0):
      ...     limit, state = threshold.update(norm, state)
      >>> print(f"{limit:.2f}")  # twice the median of 1.0 and 1.2
      2.20
    """

    init: Callable[[], Any]
    update: Callable[[Any, Any], tuple[jax.Array, Any]]
    rebase: Callable[[Any, Any], Any]
    call: str = ""

    def __repr__(self) -> str:
        """The call that created the threshold, or its functions if there is none."""
        functions = f"{self.init!r}, {self.update!r}, {self.rebase!r}"
        return self.call or f"Threshold({functions})"


def threshold_factory(factory: Callable[P, Threshold]) -> Callable[P, Threshold]:
    """Decorates a factory of thresholds.

    Their ``repr`` is the call of the factory. What they compute is traced once, not at
    every call, and outside ``jit`` it is one program.
    """

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Threshold:
        arguments = [repr(value) for value in args]
        arguments += [f"{name}={value!r}" for name, value in kwargs.items()]
        init, update, rebase, _ = factory(*args, **kwargs)
        call = f"{factory.__name__}({', '.join(arguments)})"
        return Threshold(init, jax.jit(update), jax.jit(rebase), call)

    return wrapper


@threshold_factory
def constant(limit: float | jax.Array) -> Threshold:
    """A fixed limit, as in ``optax.clip_by_global_norm``.

    **Rule**: limit_t = ``limit``. Nothing is learned; ``rebase`` does nothing.

    Args:
      limit: greatest normal value, > 0, in the unit of the stream.

    Returns:
      A :class:`Threshold` with an empty state.

    Raises:
      ValueError: ``limit`` is not positive.

    Example:
      >>> limit, _ = constant(1.0).update(3.0, ())
      >>> print(limit)
      1.0
    """
    _validate.check_interval(
        "limit", limit, "(0, inf]", "a limit must be positive, such as 1.0"
    )

    def update(x, state):
        return jnp.asarray(limit, _numerics.wide_dtype(x)), state

    return Threshold(lambda: (), update, lambda x, state: state)


def is_learnable(x) -> jax.Array:
    """Whether x can be learned as a level: finite, and neither zero nor subnormal.

    A zero norm means "no gradient". If it were learned, the limit would be 0 and the
    next gradient would be abnormal.
    """
    return jnp.isfinite(x) & (x >= _numerics.tiny(x.dtype))


def state_for(threshold: Threshold, dtype: Any) -> Any:
    """The initial state for a stream of this dtype, float32 or wider."""
    return jax.tree.map(lambda x: _at_least(x, dtype), threshold.init())


def _at_least(x, dtype):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(_numerics.promote(x.dtype, dtype))


def learn(threshold: Threshold, x, state: Any) -> tuple[jax.Array, Any]:
    """``threshold.update``, with a state that keeps its dtypes."""
    limit, learned = threshold.update(x, state)
    return limit, optax.tree.cast_like(learned, state)


def check_threshold(name: str, threshold: Any, *, optional: bool = False) -> None:
    """Raises TypeError unless ``threshold`` is a Threshold, or None where it may be."""
    if isinstance(threshold, Threshold) or (optional and threshold is None):
        return
    kind = "a Threshold or None" if optional else "a Threshold"
    raise TypeError(
        f"{name} must be {kind}, got {threshold!r}; for a fixed limit use "
        f"{name}=thresholds.constant(limit)."
    )
