"""The noise scale inside a transformation that acts on it."""

from typing import Any

import jax
import optax

from optax_stability._core import _metrics, _validate
from optax_stability._noise._estimation import estimate_noise_scale
from optax_stability._noise._state import EstimateNoiseScaleState, readings


def estimator_or_default(
    estimator: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The estimator, by default one of the whole gradient only.

    Raises:
      TypeError: it is no transformation.
    """
    if estimator is None:
        return estimate_noise_scale(scope="global")
    _validate.check_transformation("estimator", estimator)
    return optax.with_extra_args_support(estimator)


def init_estimator(estimator: optax.GradientTransformation, params: Any) -> Any:
    """The state of an estimator.

    Raises:
      ValueError: it is not one noise scale that it holds.
    """
    state = estimator.init(params)
    only_estimate(state)
    return state


def whole_gradient(state: Any) -> dict[str, jax.Array]:
    """What is known of the whole gradient, by name."""
    each = readings(only_estimate(state))
    return {key: values[0] for key, values in each.items()}


def only_estimate(state: Any) -> EstimateNoiseScaleState:
    """The one estimate in an optimizer state.

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
