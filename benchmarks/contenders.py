"""The optimizers that are broken on purpose: one setting each, published or default.

All take the learning rate with the gradient, as the extra argument ``rate``: it follows
the data, and not what an optimizer counts.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
import peers

import optax_stability as ost

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

Optimizer = Callable[[], optax.GradientTransformation]


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Times the learning rate, which the trainer hands over with the gradient."""

    def update(updates, state, params=None, **extra_args):
        del params
        return optax.tree.scale(extra_args["rate"], updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def adamw(eps: float = 1e-8) -> optax.GradientTransformation:
    """What is in optax, at the learning rate of the call."""
    step = optax.adamw(1.0, b1=0.9, b2=0.95, eps=eps, weight_decay=0.1)
    return optax.chain(step, scale_by_rate())


def clipped() -> optax.GradientTransformation:
    """What most training code uses today."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def safe_adamw() -> optax.GradientTransformation:
    """The AdamW of this library."""
    step = ost.safe_adamw(1.0, b1=0.9, b2=0.95, weight_decay=0.1)
    return optax.chain(step, scale_by_rate())


def adaptive() -> optax.GradientTransformation:
    """The recommended chain, without its guard."""
    return optax.chain(ost.clip_by_zscore(), safe_adamw())


def outliers_alone() -> optax.GradientTransformation:
    """The same with a clip that leaves ordinary norms as they are."""
    return optax.chain(ost.clip_by_zscore(at_most_median=False), safe_adamw())


def guarded(**options: Any) -> optax.GradientTransformation:
    """The recommended chain."""
    return ost.spike_guard(adaptive(), **options)


def branching(**options: Any) -> optax.GradientTransformation:
    """The recommended chain, which goes on after a spike and can take it back."""
    return ost.branch_on_spike(adaptive(), **options)


def fixed_clip() -> optax.GradientTransformation:
    """The guarded clip of outliers, the clip of most training code in front of it."""
    fixed = ost.clip_by_threshold(ost.thresholds.constant(1.0))
    return ost.spike_guard(optax.chain(fixed, outliers_alone()))


def muon() -> optax.GradientTransformation:
    """Muon on the matrices inside the blocks, Adam on the rest, at one rate."""
    import recipes

    return optax.chain(recipes.muon(1.0, weight_decay=0.1), scale_by_rate())


def clip_then_muon() -> optax.GradientTransformation:
    """The clip where it belongs."""
    return optax.chain(ost.clip_by_zscore(), muon())


def in_steps_of_eight(
    inner: optax.GradientTransformation, **options: Any
) -> optax.GradientTransformation:
    """What optax offers for accumulation."""
    steps = optax.MultiSteps(inner, 8, **options)

    def update(updates, state, params=None, **extra_args):
        return steps.update(updates, state, params, **extra_args)

    # Its gradient_transformation() would drop the learning rate.
    return optax.GradientTransformationExtraArgs(steps.init, update)


CLIP = "clip 1.0 + adamw"
OURS = "ours"
OUTLIERS = "outliers alone"
PEERS: dict[str, Optimizer] = {
    "adamw": adamw,
    CLIP: clipped,
    "apply_if_finite of it": lambda: optax.apply_if_finite(clipped(), 5),
    "MaxText, OLMo skip": lambda: peers.maxtext_skip(clipped()),
    "Levanter skip": lambda: peers.levanter_skip(clipped()),
    "ZClip": lambda: optax.chain(peers.zclip(), adamw()),
    "AdaGC": lambda: optax.chain(peers.adagc(), adamw()),
}
PARTS: dict[str, Optimizer] = {
    OUTLIERS: lambda: ost.spike_guard(outliers_alone()),
    "no clip": lambda: ost.spike_guard(safe_adamw()),
    "no guard": outliers_alone,
    "adamw of optax": lambda: ost.spike_guard(
        optax.chain(ost.clip_by_zscore(at_most_median=False), adamw())
    ),
    "norm alone": lambda: ost.skip_spikes(outliers_alone()),
    "25 skips": lambda: ost.spike_guard(outliers_alone(), max_consecutive=25),
    "and clip 1.0": fixed_clip,
}
BRANCHES: dict[str, Optimizer] = {
    CLIP: clipped,
    "skip ≤ 5": guarded,
    "skip ≤ 25": functools.partial(guarded, max_consecutive=25),
    "branch": branching,
    "branch, all kept": functools.partial(branching, keep="all"),
}
MUONS: dict[str, Optimizer] = {
    CLIP: clipped,
    "muon": muon,
    "guard": lambda: ost.spike_guard(muon()),
    "clip in front": clip_then_muon,
    OURS: lambda: ost.spike_guard(clip_then_muon()),
    "guard, clip behind": lambda: ost.spike_guard(
        optax.chain(muon(), optax.clip_by_global_norm(1.0))
    ),
}
ACCUMULATORS: dict[str, Optimizer] = {
    CLIP: lambda: in_steps_of_eight(clipped()),
    "apply_if_finite of it, inside": lambda: in_steps_of_eight(
        optax.apply_if_finite(clipped(), 5)
    ),
    "skip_not_finite": lambda: in_steps_of_eight(
        clipped(), should_skip_update_fn=optax.skip_not_finite
    ),
    OURS: lambda: ost.accumulate_moments(guarded(), 8),
}
