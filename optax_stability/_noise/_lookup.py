"""Finds and reads the noise scale, for the transformations that use it."""

from typing import Any

import jax
import optax

from optax_stability._core import _metrics, _validate
from optax_stability._noise._estimation import estimate_noise_scale
from optax_stability._noise._state import (
    EstimateNoiseScaleState,
    readings,
    which_known,
)


def estimator_or_default(
    estimator: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The estimator, by default one with global scope.

    Raises:
      TypeError: ``estimator`` is not a transformation.
    """
    if estimator is None:
        return estimate_noise_scale(scope="global")
    _validate.check_transformation("estimator", estimator)
    return optax.with_extra_args_support(estimator)


def init_estimator(estimator: optax.GradientTransformation, params: Any) -> Any:
    """The initial state of an estimator.

    Raises:
      ValueError: the state contains no noise scale, or more than one.
    """
    state = estimator.init(params)
    find_estimate(state)
    return state


def global_readings(state: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The readings of the whole gradient, and which of them are known, by name."""
    found = find_estimate(state)
    by_name = readings(found)
    known = which_known(found, by_name)
    return (
        {key: values[0] for key, values in by_name.items()},
        {key: values[0] for key, values in known.items()},
    )


def find_estimate(state: Any) -> EstimateNoiseScaleState:
    """Finds the only estimate in an optimizer state.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = _metrics.find(state, EstimateNoiseScaleState)
    if len(found) == 1:
        return found[0]
    kind = type(state).__name__
    if not found:
        raise ValueError(
            f"state, a {kind}, holds no noise scale; put estimate_noise_scale() into "
            "the chain."
        )
    raise ValueError(
        f"state, a {kind}, holds {len(found)} noise scales, of several groups or "
        "transformations; pass the state of one of them, or read all with "
        "metrics(state)."
    )
