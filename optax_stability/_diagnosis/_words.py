"""What helps, in words: for those who train with another library."""

from optax_stability._diagnosis._finding import Kind

_RATE = "lower the learning rate, at first by a factor of 3"
_CLIP = "clip the gradient norm, near its usual level"
_WARMUP = "lengthen the warm-up"
_BF16 = "use bfloat16 in place of float16"

WORDS: dict[Kind, tuple[str, ...]] = {
    "nonfinite": (
        "skip the update if loss or gradient norm is NaN or Inf",
        _BF16 + ", or a dynamic loss scale",
        "run this step again with anomaly detection to find the operation",
    ),
    "divergence": (
        "go back to a checkpoint from before this step",
        _RATE,
        _CLIP,
        _WARMUP,
    ),
    "underflow": (_BF16, "raise the loss scale"),
    "vanishing_then_surge": (
        _CLIP,
        "lower the second decay rate of Adam (β₂), for example to 0.95",
        "shrink the gradient of the embedding",
    ),
    "exploding_gradient": (_CLIP, _RATE, "inspect the batch of this step"),
    "loss_spike": (
        "inspect the batch of this step",
        "skip batches whose loss is far above the recent median",
        _CLIP,
        "if spikes come back, go back to a checkpoint and leave these batches out",
    ),
    "loss_stuck": (
        "check that labels are not all masked, and that parameters require gradients",
        "check that the optimizer holds the parameters of the model that is trained",
    ),
    "learning_rate_zero": (
        "print the learning rate of each step: the schedule may get the wrong number "
        "of steps, or may never be advanced",
    ),
    "learning_rate_too_high": (_RATE, _WARMUP),
    "attention_saturates": (
        "normalise queries and keys in the model (qk-layernorm)",
        _RATE,
        "scale the weights of queries and keys down where logits are above 100 "
        "(QK-Clip)",
    ),
    "update_too_large": (_RATE,),
    "growing_spectral_norm": ("raise the weight decay", _RATE),
    "vanishing_gradient": (
        "look for saturated or dead units, and for layers cut off from the loss",
        _BF16,
    ),
    "overfitting": (
        "stop at the lowest held-out loss, and keep that checkpoint",
        "use more data, fewer passes, dropout or weight decay",
    ),
    "eps_dominated": ("lower the ε of Adam, for example to 1e-15",),
    "guard_loss_constant": (
        "print the loss that the skip rule gets: it must change from step to step",
    ),
    "frequent_skips": (
        "inspect the batches of the skipped steps",
        "raise the limit above which a step is skipped",
    ),
    "skip_budget_spent": (
        "inspect the batches of the skipped steps",
        "use the mean loss over all devices and microbatches to decide",
    ),
    "clustered_skips": ("inspect the examples at this position, and leave them out",),
    "clipping_too_often": ("raise the limit of the gradient clipping",),
    "misplaced_clip": ("clip the gradient before the optimizer, not its update",),
    "dominant_layer": (
        "clip each tensor by its own norm, or scale the gradient of this one down",
    ),
    "bimodal_updates": (_RATE, "lower the second decay rate of Adam (β₂)"),
    "correlated_updates": ("if the loss falls slowly, raise the learning rate",),
    "noise_too_high": ("use a larger batch, or accumulate more microbatches", _RATE),
    "update_too_small": ("raise the learning rate", "look for frozen parameters"),
    "plateau": (
        "try to overfit one batch: if its loss does not fall, model or data has a bug",
        "check that labels belong to their inputs, shifted by one position if need be",
    ),
    "several_runs": ("give each training a file of its own",),
}
