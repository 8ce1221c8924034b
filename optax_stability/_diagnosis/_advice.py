"""What is likely behind each kind of finding, and what helps."""

from typing import NamedTuple

from optax_stability._diagnosis._finding import Finding, Kind
from optax_stability._diagnosis._series import History


class Advice(NamedTuple):
    """Causes and remedies of one kind, likeliest and mildest first."""

    causes: tuple[str, ...]
    remedies: tuple[str, ...]


ADVICE = {
    "nonfinite": Advice(
        (
            "overflow in low precision, or 0/0 or log 0 in the loss",
            "a corrupted batch, or a mask that leaves nothing",
            "a divergence that ended in overflow",
        ),
        (
            "leave such steps out with `spike_guard(inner)`",
            "leave out only the bad part of a batch with `microbatch_gradients`",
            "find the operation on the batch of this step with jax.debug_nans(True)",
        ),
    ),
    "divergence": Advice(
        (
            "the learning rate is too high for the curvature here",
            "logits or activations grow without a bound",
            "the data changed for good",
        ),
        (
            "go back to a checkpoint from before this step, with a lower learning rate",
            "limit the gradient with `clip_by_zscore()`",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "normalise queries and keys in the model",
        ),
    ),
    "underflow": Advice(
        (
            "gradients below the smallest number of their dtype",
            "a loss scale that is too small, or none with float16",
        ),
        (
            "scale the loss up, and the gradient down again in float32",
            "compute in bfloat16, whose range is that of float32",
            "use `safe_adamw`, which needs no ε and no certain scale",
        ),
    ),
    "vanishing_then_surge": Advice(
        (
            "Adam's second moment decayed while the layer had no gradient, so that the "
            "first large ones make large, correlated updates (Molybog et al. 2023)",
        ),
        (
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "shrink the gradient of the embedding before the clip with "
            "`scale_gradients`",
            "clip each layer by its own past with `clip_by_leaf_history()`",
            "forget stale moments with `restart_moments`",
        ),
    ),
    "exploding_gradient": Advice(
        (
            "a step into a steep region, the learning rate being too high for it",
            "corrupted or unusual data",
        ),
        (
            "limit the gradient with `clip_by_zscore()`",
            "limit each layer with `clip_by_leaf_history()`",
            "leave out what the loss confirms with `spike_guard(inner)`",
        ),
    ),
    "loss_spike": Advice(
        (
            "corrupted or unusual data, if the gradient jumps at the same step",
            "a step too long before it, if the gradient jumped earlier",
        ),
        (
            "leave such batches out with `spike_guard(inner)`",
            "take longer stretches back with `branch_on_spike(inner)`",
            "forget the spike in the moments with `restart_moments`",
            "look at the batch of this step",
        ),
    ),
    "learning_rate_too_high": Advice(
        (
            "each step overshoots: gradients change faster than Adam's moments follow",
            "the warm-up is too short",
        ),
        (
            "lower the learning rate, by a factor of 3 first",
            "lengthen the warm-up, `optax.warmup_cosine_decay_schedule`",
            "normalise queries and keys in the model, which tolerates higher ones",
        ),
    ),
    "update_too_large": Advice(
        (
            "the learning rate is too high for the size of the weights",
            "weights that start too small",
        ),
        (
            "lower the learning rate",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "bind the update to the weights with `optax.scale_by_trust_ratio`",
        ),
    ),
    "growing_spectral_norm": Advice(
        (
            "updates that always point the same way feed one singular direction",
            "attention logits that grow, with little weight decay against it",
        ),
        (
            "raise the weight decay, `safe_adamw(weight_decay=0.1)`",
            "lower the learning rate",
            "normalise queries and keys in the model",
        ),
    ),
    "vanishing_gradient": Advice(
        (
            "saturated or dead units, or attention that has collapsed on one token",
            "a layer that was cut off or frozen",
            "underflow in low precision",
        ),
        (
            "compare `record` of the layers next to it, forwards and backwards",
            "use `safe_adamw`, whose updates do not shrink with the gradient",
            "limit what comes when it returns with "
            "`scale_by_safe_adam(update_rms_max=1.0)`",
        ),
    ),
    "eps_dominated": Advice(
        (
            "gradients as small as ε: Adam has become SGD, with tiny steps",
            "a loss scale or a mean over many tokens that makes gradients small",
        ),
        (
            "use `safe_adamw` or `scale_by_safe_adam(eps=0.0)`, which need no ε",
            "lower ε of `optax.adamw(eps=1e-15)`",
        ),
    ),
    "frequent_skips": Advice(
        (
            "a share of the data is corrupted, or of another kind",
            "the run is diverging, and skipping cannot stop that",
            "a limit that is too tight for the noise of the batch",
        ),
        (
            "look at the batches of the skipped steps",
            "allow more, `spike_guard(inner, budget=64)`",
            "average more examples with `accumulate_moments`",
        ),
    ),
    "clipping_too_often": Advice(
        (
            "a fixed limit below the usual norm: the length of the gradient is lost",
            "norms that rise, so that the limit lags behind",
        ),
        (
            "let the limit follow the norm with `clip_by_zscore()`",
            "raise the limit of `clip_by_threshold(thresholds.constant(1.0))`",
        ),
    ),
    "bimodal_updates": Advice(
        (
            "most coordinates move by the whole learning rate, in step with one "
            "another: a sign of Adam's instability (Molybog et al. 2023)",
            "gradients that do not change from step to step",
        ),
        (
            "lower the learning rate, or b2 of `safe_adamw(b2=0.95)`",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "forget the moments with `restart_moments`",
        ),
    ),
    "correlated_updates": Advice(
        (
            "the same gradient at every step: the learning rate is far too low",
            "the same batch at every step",
            "a layer running away in one direction (Molybog et al. 2023)",
        ),
        (
            "where the loss falls slowly, raise the learning rate",
            "limit the update with `scale_by_safe_adam(update_rms_max=1.0)`",
            "see which layers, with `record('update', correlation=True)`",
        ),
    ),
    "noise_too_high": Advice(
        (
            "a batch too small for the noise of its gradient",
            "a learning rate that should have come down by now",
        ),
        (
            "average more examples with `accumulate_moments`",
            "let the batch grow with `batch_size_schedule`",
            "let the learning rate fall with `scale_by_noise_scale`",
        ),
    ),
    "update_too_small": Advice(
        (
            "a learning rate that is far too low",
            "ε or a clip that shrinks the update",
            "parameters that were handed over frozen",
        ),
        (
            "raise the learning rate",
            "use `safe_adamw`, whose updates do not shrink with the gradient",
        ),
    ),
    "plateau": Advice(
        (
            "a learning rate that is far too low, or so high that steps cancel",
            "parameters that do not reach the loss",
            "labels that have come apart from the inputs",
        ),
        (
            "see how far the weights move, `record('update', ratio_to_params=True)`",
            "overfit one batch first: a loss that stays is a bug in model or data",
            "lengthen the warm-up, `optax.warmup_cosine_decay_schedule`",
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
    """A finding with the advice for its kind."""
    return Finding(
        kind, metric, int(history.steps[row]), layer, evidence, *ADVICE[kind]
    )
