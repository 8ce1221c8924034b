"""What a part does to a gradient: the roles that the rules speak of.

Each set of names is measured: ``tests/checking/test_roles.py`` runs every factory
``scale_by_…`` of the installed optax and compares, so that a new or renamed one is
noticed.
"""

import numbers
from collections.abc import Callable
from typing import Any

from optax_stability._checking._description import Part

Role = Callable[[Part], bool]

# The size of the update does not depend on the size of the gradient.
_SCALE_FREE = """
    dadapt_adamw prodigy scale_by_acprop scale_by_adadelta scale_by_adam scale_by_adamax
    scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad scale_by_belief
    scale_by_factored_rms scale_by_galore scale_by_lion scale_by_muon scale_by_novograd
    scale_by_radam scale_by_rms scale_by_rprop scale_by_safe_adam scale_by_sign
    scale_by_simplified_ademamix scale_by_sm3 scale_by_stddev scale_by_yogi"""
# After some gradients a gradient of zero still moves the parameters.
_WITH_MOMENTUM = """
    dadapt_adamw ema momo momo_adam prodigy scale_by_adam scale_by_adamax scale_by_adan
    scale_by_ademamix scale_by_adopt scale_by_amsgrad scale_by_belief scale_by_cocob
    scale_by_galore scale_by_lion scale_by_madgrad scale_by_muon scale_by_novograd
    scale_by_optimistic_gradient scale_by_radam scale_by_rprop scale_by_safe_adam
    scale_by_simplified_ademamix scale_by_sm3 scale_by_yogi trace"""
SCALE_FREE = frozenset(_SCALE_FREE.split())
WITH_MOMENTUM = frozenset(_WITH_MOMENTUM.split())
# They hand the sum of several gradients on, and zeros in the calls between.
ACCUMULATES = frozenset({"accumulate_moments", "MultiSteps", "apply_every"})
# They move the parameters on their own, also where what is inside gives zeros.
MOVES_ALONE = frozenset({"lookahead", "mechanize", "schedule_free"})
MEASURES = frozenset({"estimate_noise_scale", "record"})

_CLIPS = frozenset(
    {"adaptive_grad_clip", "clip", "clip_by_global_norm", "clip_by_threshold"}
)
_OUR_GUARDS = frozenset({"branch_on_spike", "skip_spikes"})


def named(*names: str) -> Role:
    """Parts of optax or of this library with one of these names."""
    return lambda part: part.known and part.name in names


scale_free = named(*SCALE_FREE)
with_momentum = named(*WITH_MOMENTUM)
# Two of these one behind the other: the second works on what is no gradient.
optimizer = named(*SCALE_FREE & WITH_MOMENTUM)
learner = named(*SCALE_FREE | WITH_MOMENTUM)
clip = named(*_CLIPS)
our_guard = named(*_OUR_GUARDS)
guard = named(*_OUR_GUARDS, "apply_if_finite")
accumulator = named(*ACCUMULATES)
moves_alone = named(*MOVES_ALONE)


def holds(part: Part, role: Role) -> bool:
    """Whether a part has a role, or anything inside it."""
    return role(part) or any(holds(each, role) for each in part.parts)


def is_unknown(part: Part) -> bool:
    """Whether nobody knows what a part does."""
    return not part.known


def _number(value: Any) -> float:
    """A number or an array of one, or a schedule at step 1000; 0 if it is not known."""
    try:
        at_step: Any = value(1000) if callable(value) else value
        return float(at_step)
    except Exception:  # A traced number, or a schedule that needs what a step has.
        return 0.0


def decays_weights(part: Part) -> bool:
    """Whether a part adds a positive share of the parameters to the update."""
    decays = named("add_decayed_weights")(part)
    return decays and _number(part.arguments["weight_decay"]) > 0


def step_size(part: Part) -> float:
    """The factor of ``scale`` or ``scale_by_schedule``, or 0."""
    names = {"scale": "step_size", "scale_by_schedule": "step_size_fn"}
    if not named(*names)(part):
        return 0.0
    return _number(part.arguments[names[part.name]])


def turns_sign(part: Part) -> bool:
    """Whether a part turns what goes up the gradient into what goes down."""
    return step_size(part) < 0


def learning_rate(part: Part) -> bool:
    """Whether a part is a learning rate, and not a sign that is turned on purpose."""
    return turns_sign(part) and step_size(part) != -1


def changes_size(part: Part) -> bool:
    """Whether a part multiplies, limits or adds to the update."""
    names = "scale", "scale_by_noise_scale", "scale_by_schedule", "scale_gradients"
    return clip(part) or named(*names)(part) or decays_weights(part)


def thresholds_of(part: Part) -> dict[str, Any]:
    """The thresholds of a guard of ours, by name."""
    return part.arguments["guard"].detector._asdict()


def compares_norms(part: Part) -> bool:
    """Whether a part is a guard with a threshold on the norm."""
    return our_guard(part) and thresholds_of(part)["grad_norm"] is not None


def compares(part: Part) -> bool:
    """Whether a part is a guard with a threshold on anything finite."""
    return our_guard(part) and any(thresholds_of(part).values())


def needs_loss(part: Part) -> bool:
    """Whether ``update`` raises without ``value=``."""
    return our_guard(part) and part.arguments["guard"].detector.needs_loss


def needs_squares(part: Part) -> bool:
    """Whether ``update`` raises without the mean square in ``moments=``."""
    adam = named("scale_by_safe_adam")(part)
    return adam and part.arguments["second_moment"] == "microbatch"


def needs_moments(part: Part) -> bool:
    """Whether ``update`` raises without ``moments=``."""
    return named("estimate_noise_scale")(part) or needs_squares(part)


def needs_extra_args(part: Part) -> bool:
    """Whether ``update`` raises without extra arguments."""
    return needs_loss(part) or needs_moments(part)


def hands_nothing_on(part: Part) -> bool:
    """Whether a wrapper of optax takes no extra arguments, and so hands none on."""
    return part.known and bool(part.parts) and not part.takes_extra_args


def keeps_nan(part: Part) -> bool:
    """Whether one NaN stays in an accumulator of optax for good."""
    if named("MultiSteps")(part):
        names = (getattr(x, "__qualname__", "") for x in part.arguments.values())
        return any("<locals>.should_skip_update_fn" in name for name in names)
    return named("apply_every")(part)


def clips_leaves_by_history(part: Part) -> bool:
    """Whether a clip learns a limit for each leaf."""
    ours = named("clip_by_threshold")(part) and part.arguments["per_leaf"]
    return ours and not repr(part.arguments["threshold"]).startswith("constant(")


def records(name: str) -> Role:
    """Parts that are ``record(name)`` and measure the updates."""
    return lambda part: (
        named("record")(part)
        and part.arguments["name"] == name
        and part.arguments["of"] == "updates"
    )


def compares_pairs(part: Part) -> bool:
    """Whether an estimate of the noise is from differences of gradients."""
    return named("estimate_noise_scale")(part) and part.arguments["difference"]


def has_no_eps(part: Part) -> bool:
    """Whether a part is an Adam whose update no constant factor can change."""
    eps = part.arguments.get("eps")
    adam = named("scale_by_safe_adam")(part)
    return adam and isinstance(eps, numbers.Real) and eps == 0
