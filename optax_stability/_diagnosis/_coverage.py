"""Which checks a history allows, and what the others lack.

Silence is worth something only if it is known what was looked at.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._finding import KINDS, Kind
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import median

# What a reader calls it → names in a history, each also as ``<prefix>/<name>``; with
# ``/`` at the end, one per layer.
LOSS = "loss"
NORM = "gradient norm"
RATE = "learning rate"
HELD_OUT = "held-out loss"
_COLUMNS = {
    LOSS: ("loss", "skip/value"),
    NORM: ("grad/norm", "skip/norm", "clip/norm"),
    RATE: ("learning_rate",),
    HELD_OUT: ("eval/loss",),
    "gradient norm of each layer": ("grad/norm/", "clip/norm/"),
    "share of zeros in the gradient": ("grad/zero_fraction",),
    "size of the update relative to the weights": ("update/param_ratio",),
    "largest singular values of the weights": ("params/spectral_norm",),
    "attention logits": ("extra/attention_logits", "attention/logit_bound"),
    "share of ε in Adam's denominator": ("adam/eps_share",),
    "correlation of successive gradients": ("adam/correlation", "update/correlation"),
    "distribution of the update": ("update/bimodality",),
    "noise scale": ("noise_scale/low",),
    "clip limit": ("clip/limit", "clip/fraction"),
    "loss that a guard is given": ("skip/value_limit",),
    "skipped steps": ("skip/skipped", "skip/total"),
    "spikes that no skip was left for": ("skip/declined_total",),
    "step": ("step",),
}
_RATIO = "size of the update relative to the weights"
_CORRELATION = "correlation of successive gradients"
_SKIPS = "skipped steps"
# What each check needs; of several names in one tuple one is enough.
_NEEDS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "nonfinite": ((LOSS, NORM),),
    "divergence": ((LOSS,),),
    "underflow": ((NORM, "share of zeros in the gradient"),),
    "vanishing_then_surge": (("gradient norm of each layer",),),
    "exploding_gradient": ((NORM,),),
    "loss_spike": ((LOSS,),),
    "loss_stuck": ((LOSS,),),
    "learning_rate_zero": ((RATE,),),
    "learning_rate_too_high": ((_CORRELATION,),),
    "attention_saturates": (("attention logits",),),
    "update_too_large": ((_RATIO,),),
    "growing_spectral_norm": (("largest singular values of the weights",),),
    "vanishing_gradient": ((NORM,),),
    "overfitting": ((HELD_OUT,), (LOSS,)),
    "eps_dominated": (("share of ε in Adam's denominator",),),
    "guard_loss_constant": (("loss that a guard is given",),),
    "frequent_skips": ((_SKIPS,),),
    "skip_budget_spent": (("spikes that no skip was left for",),),
    "clustered_skips": ((_SKIPS,),),
    "clipping_too_often": (("clip limit",),),
    "misplaced_clip": (("clip limit",), (NORM,)),
    "dominant_layer": (("gradient norm of each layer",),),
    "bimodal_updates": (("distribution of the update",),),
    "correlated_updates": ((_CORRELATION,),),
    "noise_too_high": (("noise scale",),),
    "update_too_small": ((_RATIO,),),
    "plateau": ((LOSS,),),
    "several_runs": (("step",),),
}
# Rows that a check needs, where it is more than a few.
_ROWS: dict[Kind, int] = {
    "guard_loss_constant": limits.WARMUP_VALUES,
    "vanishing_gradient": limits.WARMUP_VALUES,
    "clipping_too_often": limits.CLIPPED_WINDOW,
    "plateau": 4 * limits.CENTRE,
}


class Check(NamedTuple):
    """One check.

    Attributes:
      kind: Kind – what it looks for.
      lacks: str – what it could not run without; empty if it ran.
    """

    kind: Kind
    lacks: str


def _measured(history: History, what: str) -> bool:
    """Whether a column was measured, by any of its names."""
    for name in _COLUMNS[what]:
        if name.endswith("/"):
            if history.layers(name[:-1]).names:
                return True
        elif history.find_all(name) or history.layers(name).names:
            return True
    # All NaN is a loss or a norm that was measured, and never finite.
    return what in (LOSS, NORM) and _COLUMNS[what][0] in history.columns


def coverage(history: History) -> list[Check]:
    """What each check lacks, in the order of ``KINDS``."""
    found = []
    for kind in KINDS:
        lacks = [
            " or ".join(names)
            for names in _NEEDS[kind]
            if not any(_measured(history, name) for name in names)
        ]
        rows = _ROWS.get(kind, limits.MIN_MEASUREMENTS + 1)
        if not lacks and history.length < rows:
            lacks = [f"{rows} rows (there are {history.length})"]
        found.append(Check(kind, " and ".join(lacks)))
    return found


def cannot_be_told(history: History) -> list[str]:
    """Sentences on what such a run may have and its log cannot show."""
    found = []
    loss = loss_of(history)
    values = np.zeros(0) if loss is None else loss.values[np.isfinite(loss.values)]
    if len(values) >= limits.CENTRE and not _measured(history, HELD_OUT):
        first = median(values[: limits.MIN_MEASUREMENTS])
        last = median(values[-limits.CENTRE :])
        near_zero = 0 <= last <= limits.NEAR_ZERO * first
        seen = (
            f"the training loss fell from {first:.3g} to {last:.3g}, as it does when a "
            "model learns its examples by heart: whether it overfits "
            if near_zero
            else "whether the model overfits "
        )
        found.append(seen + "cannot be told, for lack of a held-out loss")
    if len(values):
        found.append(
            "whether the loss is as low as such a run should be (labels, data, model) "
            "cannot be told, for lack of a run to compare with: --against OTHER"
        )
    return found
