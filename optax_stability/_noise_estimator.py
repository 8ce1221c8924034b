"""The noise scale inside a transformation that acts on it."""

from typing import Any

import jax
import optax

from optax_stability import _metrics
from optax_stability._noise_scale import estimate_noise_scale
from optax_stability._noise_scale_state import EstimateNoiseScaleState, readings


def checked(
    estimator: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The estimator, by default one of the whole gradient only.

    Raises:
      TypeError: it is something else.
    """
    if estimator is None:
        return estimate_noise_scale(scope="global")
    made = getattr(estimator, "init", lambda _: None)({})
    if not isinstance(made, EstimateNoiseScaleState):
        raise TypeError(
            f"estimator must be an estimate_noise_scale(...), got {estimator!r}; leave "
            "it out for the default."
        )
    return optax.with_extra_args_support(estimator)


def whole(estimate: Any) -> dict[str, jax.Array]:
    """What is known of the whole gradient, by name."""
    return {key: values[0] for key, values in readings(estimate).items()}


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
