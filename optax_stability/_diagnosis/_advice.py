"""Likely causes and remedies of each kind of finding."""

from typing import NamedTuple

from optax_stability._diagnosis._finding import Finding, Kind
from optax_stability._diagnosis._series import History


class Advice(NamedTuple):
    """Causes (likeliest first) and remedies (mildest first) of one kind."""

    causes: tuple[str, ...]
    remedies: tuple[str, ...]


ADVICE = {
    "nonfinite": Advice(
        (
            "overflow in low precision, or 0/0 or log 0 in the loss",
            "a corrupted batch, or a mask that excludes every element",
            "a divergence that ended in overflow",
        ),
        (
            "skip such steps with `spike_guard(inner)`",
            "leave out only the bad microbatches with `microbatch_gradients`",
            "run this step again under jax.debug_nans(True) to find the operation",
        ),
    ),
    "divergence": Advice(
        (
            "the learning rate is too high for the local curvature",
            "logits or activations grow without bound",
            "the data distribution changed permanently",
        ),
        (
            "restore a checkpoint from before this step, and lower the learning rate",
            "limit the gradient with `clip_by_zscore()`",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "normalise queries and keys in the model",
        ),
    ),
    "underflow": Advice(
        (
            "gradients below the smallest positive number of their dtype",
            "a loss scale that is too small, or float16 without a loss scale",
        ),
        (
            "multiply the loss by a scale, and divide the gradient by it in float32",
            "compute in bfloat16, which has the range of float32",
            "use `safe_adamw`, which needs neither ε nor a particular gradient scale",
        ),
    ),
    "vanishing_then_surge": Advice(
        (
            "Adam's second moment decayed while the layer had no gradient, so that the "
            "first large gradients cause large, correlated updates "
            "(Molybog et al. 2023)",
        ),
        (
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "scale the gradient of the embedding down before clipping, with "
            "`scale_gradients`",
            "clip each layer relative to its own recent norms with "
            "`clip_by_leaf_history()`",
            "reset stale moments with `restart_moments`",
        ),
    ),
    "exploding_gradient": Advice(
        (
            "a step into a steep region, where the learning rate is too high",
            "corrupted or unusual data",
        ),
        (
            "limit the gradient with `clip_by_zscore()`",
            "limit each layer with `clip_by_leaf_history()`",
            "skip the jumps that the loss confirms with `spike_guard(inner)`",
        ),
    ),
    "loss_spike": Advice(
        (
            "corrupted or unusual data, if the gradient jumps at the same step",
            "too large a step before the spike, if the gradient jumped earlier",
        ),
        (
            "skip such batches with `spike_guard(inner)`",
            "roll back after several such batches with `branch_on_spike(inner)`",
            "remove the spike from the moments with `restart_moments`",
            "inspect the batch of this step",
        ),
    ),
    "learning_rate_too_high": Advice(
        (
            "each step overshoots: the gradient changes faster than Adam's moments can "
            "follow",
            "the warm-up is too short",
        ),
        (
            "lower the learning rate, at first by a factor of 3",
            "lengthen the warm-up of `optax.warmup_cosine_decay_schedule`",
            "normalise queries and keys in the model, so that it tolerates a higher "
            "learning rate",
        ),
    ),
    "update_too_large": Advice(
        (
            "the learning rate is too high for the size of the weights",
            "weights that were initialised too small",
        ),
        (
            "lower the learning rate",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "scale the update by the norm of the weights with "
            "`optax.scale_by_trust_ratio`",
        ),
    ),
    "growing_spectral_norm": Advice(
        (
            "successive updates in the same direction increase one singular value",
            "growing attention logits, and too little weight decay to limit them",
        ),
        (
            "raise the weight decay, for example `safe_adamw(weight_decay=0.1)`",
            "lower the learning rate",
            "normalise queries and keys in the model",
        ),
    ),
    "vanishing_gradient": Advice(
        (
            "saturated or dead units, or attention that has collapsed to one token",
            "a layer that is frozen, or disconnected from the loss",
            "underflow in low precision",
        ),
        (
            "compare the metrics of `record` for the layers before and after this one",
            "use `safe_adamw`, whose updates do not shrink with the gradient",
            "limit the update when the gradient returns, with "
            "`scale_by_safe_adam(update_rms_max=1.0)`",
        ),
    ),
    "eps_dominated": Advice(
        (
            "gradients as small as ε: Adam then acts like SGD with tiny steps",
            "a loss scale, or a mean over many tokens, that makes gradients small",
        ),
        (
            "use `safe_adamw` or `scale_by_safe_adam(eps=0.0)`, which need no ε",
            "lower ε, for example `optax.adamw(eps=1e-15)`",
        ),
    ),
    "frequent_skips": Advice(
        (
            "part of the data is corrupted, or comes from another distribution",
            "the run is diverging, and skipping cannot stop that",
            "a limit that is too low for the noise of the batch",
        ),
        (
            "inspect the batches of the skipped steps",
            "allow more skips with `spike_guard(inner, budget=64)`",
            "average more examples with `accumulate_moments`",
        ),
    ),
    "clipping_too_often": Advice(
        (
            "a fixed limit below the usual norm, so that every norm becomes the limit",
            "rising norms, which the limit follows too slowly",
        ),
        (
            "let the limit follow the norm with `clip_by_zscore()`",
            "raise the limit of `clip_by_threshold(thresholds.constant(1.0))`",
        ),
    ),
    "bimodal_updates": Advice(
        (
            "most coordinates move by the full learning rate at the same time: a sign "
            "of Adam's instability (Molybog et al. 2023)",
            "gradients that do not change from step to step",
        ),
        (
            "lower the learning rate, or lower b2, for example `safe_adamw(b2=0.95)`",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "reset the moments with `restart_moments`",
        ),
    ),
    "correlated_updates": Advice(
        (
            "nearly the same gradient at every step: the learning rate is far too low",
            "the same batch at every step",
            "a layer that diverges in one direction (Molybog et al. 2023)",
        ),
        (
            "if the loss falls slowly, raise the learning rate",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "find the affected layers with `record('update', correlation=True)`",
        ),
    ),
    "noise_too_high": Advice(
        (
            "a batch too small for the noise of its gradient",
            "a learning rate that should have decayed by now",
        ),
        (
            "average more examples with `accumulate_moments`",
            "increase the batch size with `batch_size_schedule`",
            "lower the learning rate with `scale_by_noise_scale`",
        ),
    ),
    "update_too_small": Advice(
        (
            "a learning rate that is far too low",
            "ε or a clip that shrinks the update",
            "frozen parameters",
        ),
        (
            "raise the learning rate",
            "use `safe_adamw`, whose updates do not shrink with the gradient",
        ),
    ),
    "plateau": Advice(
        (
            "a learning rate that is far too low, or so high that steps cancel out",
            "parameters that do not affect the loss",
            "labels that do not match the inputs",
        ),
        (
            "measure how far the weights move with "
            "`record('update', ratio_to_params=True)`",
            "try to overfit one batch: if its loss does not fall, model or data has "
            "a bug",
            "lengthen the warm-up of `optax.warmup_cosine_decay_schedule`",
        ),
    ),
}


def finding(
    kind: Kind,
    history: History,
    row: int,
    metric: str,
    layer: str | None,
    evidence: str,
) -> Finding:
    """A finding, with the causes and remedies of its kind."""
    return Finding(
        kind, metric, int(history.steps[row]), layer, evidence, *ADVICE[kind]
    )
