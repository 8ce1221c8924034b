"""The order of clips, optimizers, weight decay and learning rate."""

import numbers
from collections.abc import Sequence

from optax_stability._checking import _roles
from optax_stability._checking._placement import (
    Place,
    is_behind,
    is_between,
    is_in_front_of,
    is_inside,
)
from optax_stability._checking._roles import named
from optax_stability._checking._rule import Rule


def _norm_is_read(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether a clip or guard between reads the norm, or a factor is 0."""
    reads = (
        is_between(place, first, second)
        and (_roles.clip(place.part) or _roles.our_guard(place.part))
        for place in places
    )
    factors = first.part.arguments["factors"].values()
    return any(reads) or any(factor == 0 for factor in factors)


def _is_unknown(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether there is a part of which nobody knows what it does to the sign."""
    del first, second
    return any(_roles.is_unknown(place.part) for place in places)


def _has_sign_later(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether a part behind the decay turns the sign, or nobody knows."""
    turned = (
        _roles.turns_sign(place.part) and is_behind(place, first) for place in places
    )
    return any(turned) or _is_unknown(first, second, places)


def _still_clips(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether the second of two clips is lower, or the gradient changes between."""
    limits = first.part.arguments["max_norm"], second.part.arguments["max_norm"]
    if not all(isinstance(limit, numbers.Real) for limit in limits):
        return True
    changed = any(
        is_between(place, second, first)
        and place is not first
        and not named(*_roles.MEASURES, "identity")(place.part)
        for place in places
    )
    return limits[0] < limits[1] or changed


def _restarts_nothing(part) -> bool:
    return named("restart_moments")(part) and not any(
        _roles.holds(each, _learns) for each in part.parts
    )


def _learns(part) -> bool:
    return _roles.learner(part) or _roles.is_unknown(part)


def _is_itself(first: Place, second: Place) -> bool:
    return first is second


RULES = (
    Rule(
        "clip behind optimizer",
        _roles.clip,
        is_behind,
        _roles.scale_free,
        "{first} stands behind {second}: it limits the update, whose size does not "
        "depend on that of the gradient, and a spike is in the state of {second} by "
        "then. Put it in front: chain({first}, {second}, …).",
    ),
    Rule(
        "clip of leaves in front of Muon",
        _roles.clips_leaves_by_history,
        is_in_front_of,
        named("scale_by_muon"),
        "{first} with a limit for each leaf stands in front of {second}: it changes "
        "the size of single gradients in its momentum, but not that of its updates, "
        "and costs more than it saves. Clip the whole gradient: clip_by_zscore().",
    ),
    Rule(
        "clip twice",
        named("clip_by_global_norm"),
        is_behind,
        named("clip_by_global_norm"),
        "{first} stands behind {second}, whose limit is not higher: it never clips. "
        "Leave one of them out.",
        unless=_still_clips,
    ),
    Rule(
        "optimizer behind optimizer",
        _roles.optimizer,
        is_behind,
        _roles.optimizer,
        "{first} stands behind {second}: it takes the update of {second} for a "
        "gradient. Keep one of them.",
    ),
    Rule(
        "learning rate in front of optimizer",
        _roles.learning_rate,
        is_in_front_of,
        _roles.scale_free,
        "{first} stands in front of {second}, whose update does not depend on the size "
        "of the gradient: the learning rate has no effect. Put it behind: "
        "chain({second}, …, {first}).",
    ),
    Rule(
        "two learning rates",
        _roles.learning_rate,
        is_behind,
        _roles.learning_rate,
        "{first} stands behind another learning rate: each turns the sign, and "
        "together they go up the gradient. Give the learning rate once.",
        unless=_is_unknown,
    ),
    Rule(
        "decay in front of optimizer",
        _roles.decays_weights,
        is_in_front_of,
        named(*_roles.SCALE_FREE - {"scale_by_adadelta"}),
        "{first} stands in front of {second}, which divides the decay by the size of "
        "the gradient: weights with large gradients hardly decay. Put it behind: "
        "chain({second}, {first}, …).",
    ),
    Rule(
        "decay behind learning rate",
        _roles.decays_weights,
        is_behind,
        _roles.turns_sign,
        "{first} stands behind {second}: the sign has been turned by then, and weights "
        "grow in place of decaying. Put it in front: chain({first}, {second}).",
        unless=_has_sign_later,
    ),
    Rule(
        "scaled leaves in front of Adam",
        named("scale_gradients"),
        is_in_front_of,
        _roles.has_no_eps,
        "{first} stands in front of {second} with no clip between them: Adam without ε "
        "does not depend on constant factors, so that it does nothing. Put a clip of "
        "the global norm between them, or leave it out.",
        unless=_norm_is_read,
    ),
    Rule(
        "noise scale in front of optimizer",
        named("scale_by_noise_scale"),
        is_in_front_of,
        _roles.scale_free,
        "{first} stands in front of {second}, whose update does not depend on the size "
        "of the gradient: it has next to no effect. Put it behind: "
        "chain({second}, …, {first}).",
    ),
    Rule(
        "optimizer switched off",
        _roles.scale_free,
        is_inside,
        named("conditionally_transform", "when_noisy"),
        "{first} stands inside {second}: while that is off, the gradient itself is the "
        "update. Put only a clip inside.",
    ),
    Rule(
        "nothing to restart",
        _restarts_nothing,
        _is_itself,
        _restarts_nothing,
        "{first} has nothing inside that it could restart. Put it around the optimizer "
        "with the moments: {first}(scale_by_safe_adam(), …).",
    ),
    Rule(
        "restart of what should go on",
        named("clip_by_threshold", "scale_by_schedule", "skip_spikes"),
        is_inside,
        named("restart_moments"),
        "{first} stands inside {second}, which starts it again from step 0 with the "
        "moments. Put only the optimizer with the moments inside: "
        "{second}(scale_by_safe_adam(), …).",
    ),
)
