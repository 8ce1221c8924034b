"""What the sentences call a part: the name under which a user knows it."""

from optax_stability._checking import _roles
from optax_stability._checking._description import Part

# By the function that makes the threshold.
_CLIPS = {
    "zscore": "clip_by_zscore",
    "window_quantile": "clip_by_quantile",
    "ema_ratio": "clip_by_leaf_history",
}


def title(part: Part) -> str:
    """The name of a part in a sentence."""
    if _roles.named("record")(part):
        return f"record({part.arguments['name']!r})"
    if _roles.named("skip_spikes")(part):
        every = all(_roles.thresholds_of(part).values())
        return "spike_guard" if every else "skip_spikes"
    if _roles.named("clip_by_threshold")(part):
        made = repr(part.arguments["threshold"])
        for wrapper in ("at_most_median(", "relearn("):
            made = made.removeprefix(wrapper)
        return _CLIPS.get(made.split("(")[0], part.name)
    if _roles.turns_sign(part):
        return "scale_by_learning_rate"
    return part.name
