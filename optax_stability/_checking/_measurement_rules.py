"""Where measurements, accumulation and extra arguments do not reach what needs them."""

from collections.abc import Sequence

from optax_stability._checking import _roles
from optax_stability._checking._placement import (
    Place,
    is_behind,
    is_in_front_of,
    is_inside,
)
from optax_stability._checking._roles import named
from optax_stability._checking._rule import Rule


def _has_own_moments(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether ``accumulate_moments`` between the two makes what the first needs."""
    del places
    between = first.around[first.around.index(second.part) + 1 :]
    made = any(named("accumulate_moments")(part) for part in between)
    return made and not _roles.needs_loss(first.part)


def _has_another_name(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether two records differ in what they are called."""
    del places
    return first.part.arguments["name"] != second.part.arguments["name"]


def _is_told_already(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether the optimizer behind the accumulation is the larger fault."""
    del first
    return any(
        _roles.with_momentum(place.part) and is_behind(place, second)
        for place in places
    )


def _changes_update(part) -> bool:
    return _roles.scale_free(part) or _roles.changes_size(part)


def _changes_gradient(part) -> bool:
    return _roles.scale_free(part) or _roles.clip(part)


def _needs_shapes(part) -> bool:
    clips = named("clip_by_threshold")(part) and part.arguments["per_leaf"]
    return clips or named("scale_by_muon")(part)


def _keeps_no_squares(part) -> bool:
    return named("accumulate_moments")(part) and part.arguments["mean_square"] is False


RULES = (
    Rule(
        "extra arguments that stop",
        _roles.needs_extra_args,
        is_inside,
        _roles.hands_nothing_on,
        "{first} stands inside {second}, which hands no extra arguments on: value= and "
        "moments= do not reach it. Put {first} around {second}, or leave {second} out.",
        unless=_has_own_moments,
    ),
    Rule(
        "moments of one call",
        _roles.needs_moments,
        is_inside,
        named("MultiSteps"),
        "{first} stands inside {second}, which makes no moments: those that you pass "
        "are of one call, and the gradient is of all. Replace {second} by "
        "accumulate_moments.",
        unless=_has_own_moments,
    ),
    Rule(
        "no mean square",
        _roles.needs_squares,
        is_inside,
        _keeps_no_squares,
        "{first} with second_moment='microbatch' stands inside {second} with "
        "mean_square=False: the squares that it needs are not kept. Leave "
        "mean_square=False out.",
    ),
    Rule(
        "accumulation twice",
        _roles.accumulator,
        is_inside,
        _roles.accumulator,
        "{first} stands inside {second}: a step takes as many calls as the product of "
        "their lengths. Keep one of them.",
    ),
    Rule(
        "accumulation behind optimizer",
        named("accumulate_moments", "MultiSteps"),
        is_behind,
        _roles.learner,
        "{first} stands behind {second}, which takes a step of its own for every "
        "microbatch. Put the accumulation outermost: {first}(chain({second}, …), …).",
    ),
    Rule(
        "optimizer behind accumulation",
        _roles.with_momentum,
        is_behind,
        _roles.accumulator,
        "{first} stands behind {second}: in the calls that only accumulate it gets "
        "zeros, and moves the parameters by its momentum. Put the accumulation around "
        "it: accumulate_moments(chain(…, {first}, …), every_k).",
    ),
    Rule(
        "decay behind accumulation",
        _roles.decays_weights,
        is_behind,
        _roles.accumulator,
        "{first} stands behind {second}: it moves the parameters in the calls that "
        "only accumulate as well. Put the accumulation around it: "
        "accumulate_moments(chain(…, {first}, …), every_k).",
        unless=_is_told_already,
    ),
    Rule(
        "history around accumulation",
        _roles.accumulator,
        is_inside,
        named("record_history"),
        "{first} stands inside {second}: the history has one row for each microbatch, "
        "most of which take no step. Put the accumulation outermost: "
        "accumulate_moments({second}(…), every_k).",
    ),
    Rule(
        "gradient measured too late",
        _roles.records("grad"),
        is_behind,
        _changes_gradient,
        "{first} stands behind {second}: it does not measure the gradient, which its "
        "name says to diagnose. Put it first, or give it another name.",
    ),
    Rule(
        "update measured too early",
        _roles.records("update"),
        is_in_front_of,
        _changes_update,
        "{first} stands in front of {second}: it does not measure the update, which "
        "its name says to diagnose. Put it last, or give it another name.",
    ),
    Rule(
        "one name for two records",
        named("record"),
        is_behind,
        named("record"),
        "{first} stands in the chain twice: metrics has to put the place in front of "
        "both names, and diagnose finds neither. Give one of them another name.",
        unless=_has_another_name,
    ),
    Rule(
        "pairs measured too late",
        _roles.compares_pairs,
        is_behind,
        _changes_gradient,
        "{first} with difference=True stands behind {second}: it compares successive "
        "gradients, and these are none any more. Put it in front: "
        "chain({first}, …, {second}).",
    ),
    Rule(
        "leaves flattened",
        _needs_shapes,
        is_inside,
        named("flatten"),
        "{first} stands inside {second}, where all parameters are one vector: it needs "
        "the single leaves. Leave {second} out.",
    ),
)
