"""Where a guard may not stand, and what may not stand around, before and behind it."""

from collections.abc import Sequence

from optax_stability._checking import _roles
from optax_stability._checking._placement import (
    Place,
    is_apart_from,
    is_behind,
    is_in_front_of,
    is_inside,
)
from optax_stability._checking._roles import named
from optax_stability._checking._rule import Rule


def _is_guarded(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether another guard is around both."""
    del places
    return any(_roles.guard(part) for part in second.around if part in first.around)


def _is_told_already(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether the optimizer behind the guard is the larger fault."""
    if _is_guarded(first, second, places):
        return True
    return any(
        _roles.with_momentum(place.part) and is_behind(place, second)
        for place in places
    )


def _compares_nothing(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether the inner one of two guards stops what is not finite, and no more."""
    del second, places
    return not _roles.compares(first.part)


def _is_not_frozen(first: Place, second: Place, places: Sequence[Place]) -> bool:
    """Whether zeros are for all leaves, or the guard gets zeros for them already."""
    between = first.around[first.around.index(second.part) + 1 :]
    for_some = any(named("masked", "partition")(part) for part in between)
    return not for_some or any(
        named("set_to_zero")(place.part) and is_in_front_of(place, second)
        for place in places
    )


RULES = (
    Rule(
        "optimizer behind guard",
        _roles.with_momentum,
        is_behind,
        _roles.guard,
        "{first} stands behind {second}, not inside it: in a skipped step it gets "
        "zeros, and moves the parameters by its momentum. Put it inside: "
        "{second}(chain(…, {first}, …)).",
        unless=_is_guarded,
    ),
    Rule(
        "decay behind guard",
        _roles.decays_weights,
        is_behind,
        _roles.guard,
        "{first} stands behind {second}, not inside it: it moves the parameters in a "
        "skipped step as well. Put it inside: {second}(chain(…, {first}, …)).",
        unless=_is_told_already,
    ),
    Rule(
        "guard behind optimizer",
        _roles.guard,
        is_behind,
        _roles.learner,
        "{first} stands behind {second}: what it should keep out is in the state of "
        "{second} before it looks. Put it around both: {first}(chain({second}, …)).",
    ),
    Rule(
        "NaN hidden from guard",
        named("clip_by_threshold", "zero_nans"),
        is_in_front_of,
        _roles.guard,
        "{first} stands in front of {second}: it turns what is not finite into zeros, "
        "so that the guard takes the step. Put it inside: {second}(chain({first}, …)).",
        unless=_is_guarded,
    ),
    Rule(
        "clip in front of guard",
        lambda part: _roles.clip(part) and part.name != "clip_by_threshold",
        is_in_front_of,
        _roles.compares_norms,
        "{first} stands in front of {second}: the guard compares norms that are cut "
        "already, and no gradient is a spike for it. Put the clip inside: "
        "{second}(chain({first}, …)).",
        unless=_is_guarded,
    ),
    Rule(
        "guard in guard",
        _roles.our_guard,
        is_inside,
        _roles.guard,
        "{first} stands inside {second}, another guard: it sees and counts only what "
        "the outer one lets through. Keep one of them.",
        unless=_compares_nothing,
    ),
    Rule(
        "guard in accumulator of optax",
        _roles.guard,
        is_inside,
        _roles.keeps_nan,
        "{first} stands inside {second}: one NaN stays in the accumulator of {second} "
        "for good, and every later step is skipped. Replace {second} by "
        "accumulate_moments.",
    ),
    Rule(
        "guard behind accumulator of optax",
        _roles.guard,
        is_behind,
        _roles.keeps_nan,
        "{first} stands behind {second}: one NaN stays in the accumulator of {second} "
        "for good, and every later step is skipped. Replace {second} by "
        "accumulate_moments around everything.",
    ),
    Rule(
        "guard in a wrapper that moves alone",
        _roles.guard,
        is_inside,
        _roles.moves_alone,
        "{first} stands inside {second}, which moves the parameters in a skipped step "
        "as well. Put the guard outermost: {first}({second}(…)).",
    ),
    Rule(
        "accumulation in guard",
        named("accumulate_moments"),
        is_inside,
        _roles.our_guard,
        "{first} stands inside {second}: the guard judges single microbatches, and a "
        "window waits for those that it skips. Put the accumulation outermost: "
        "{first}({second}(…), every_k).",
    ),
    Rule(
        "history in guard",
        named("record_history"),
        is_inside,
        _roles.our_guard,
        "{first} stands inside {second}: a skipped step leaves no row, and no row says "
        "what the guard did. Put it around: {first}({second}(…)).",
    ),
    Rule(
        "history beside guard",
        named("record_history"),
        is_apart_from,
        _roles.our_guard,
        "{first} stands beside {second}: no row says what the guard did. Put it around "
        "everything: {first}(chain(…, {second}(…))).",
    ),
    Rule(
        "frozen leaves in guard",
        named("set_to_zero"),
        is_inside,
        _roles.our_guard,
        "{first} for frozen leaves stands inside {second}: a NaN in the gradient of a "
        "leaf that is never trained skips the step. Put optax.freeze(mask) in front: "
        "chain(freeze(mask), {second}(…)).",
        unless=_is_not_frozen,
    ),
    Rule(
        "change behind branch",
        _roles.changes_size,
        is_behind,
        named("branch_on_spike"),
        "{first} stands behind {second}, not inside it: going back to the parameters "
        "of before is an update too, and is changed by it. Put it inside: "
        "{second}(chain(…, {first})).",
        unless=lambda first, second, places: _roles.decays_weights(first.part),
    ),
)
