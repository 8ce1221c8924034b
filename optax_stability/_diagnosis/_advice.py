"""Likely causes and remedies of each kind of finding."""

import re
from typing import NamedTuple

from optax_stability._diagnosis._finding import Finding, Kind
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._words import WORDS


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
    "loss_stuck": Advice(
        (
            "the optimizer does not change the parameters that the loss depends on",
            "every label is masked, so that the loss is a mean over nothing",
            "the same value is logged again and again",
        ),
        (
            "measure how far the weights move with "
            "`record('update', ratio_to_params=True)`",
            "count the labels that are not masked, in one batch",
            "look at the norm of the gradient: `record('grad')`",
        ),
    ),
    "learning_rate_zero": Advice(
        (
            "a schedule that starts, or ends, at 0, or whose number of steps is too "
            "small",
            "a schedule that advances once per epoch, or not at all",
        ),
        (
            "print the schedule for the steps of the run: "
            "`optax.warmup_cosine_decay_schedule` takes the number of all steps",
            "count its steps in updates, not in microbatches, with "
            "`accumulate_moments`",
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
    "attention_saturates": Advice(
        (
            "the learning rate is too high: queries and keys grow at every step until "
            "each position looks at one token alone, and the loss is stuck",
            "a warm-up that is too short, or too little weight decay",
        ),
        (
            "normalise queries and keys in the model (qk-layernorm): Flax's "
            "MultiHeadAttention has the argument normalize_qk=True",
            "lower the learning rate, at first by a factor of 3",
            "brake the growth with `clip_attention_logits`, which cures nothing",
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
    "overfitting": Advice(
        (
            "the model repeats its training data: too many passes over few examples",
            "too little regularisation for the size of the data",
        ),
        (
            "stop at the lowest held-out loss, and keep that checkpoint",
            "raise the weight decay, for example `safe_adamw(weight_decay=0.1)`",
            "train on more data, for fewer passes, or with dropout",
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
    "guard_loss_constant": Advice(
        (
            "a loss probe in the optimizer, and a loss function that was not given to "
            "`probed`: the guard then sees 0",
            "a constant passed as `value=`, or a part of the loss that is masked out",
            "an objective that is constant by design, such as that of a policy "
            "gradient on its own samples",
        ),
        (
            "give the trainer `probed` of the loss function, beside "
            "`with_loss_probe(tx)`",
            "pass the loss of the step where the call of update is yours: value=loss",
            "watch gradient norms alone with `spike_guard(inner, loss=False)`",
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
    "skip_budget_spent": Advice(
        (
            "more spikes than `max_share` or the budget allow to skip",
            "a heavy tail of losses: of one microbatch, and not of the whole batch",
        ),
        (
            "pass the mean loss over all devices and microbatches to the guard",
            "inspect the batches of the skipped steps",
            "raise the share, for example `spike_guard(inner, max_share=0.01)`",
        ),
    ),
    "clustered_skips": Advice(
        (
            "the same examples are abnormal in every pass over the data",
            "a shard of the data is damaged, or from another source",
        ),
        (
            "inspect the examples at this position, and leave them out",
            "leave out only the bad microbatches with `microbatch_gradients`",
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
    "misplaced_clip": Advice(
        (
            "the clip stands behind an optimizer that normalises its update, such as "
            "Muon: it sees nearly the same norm at every step, and never the gradient",
        ),
        (
            "put the clip first: `optax.chain(clip_by_zscore(), optimizer)`",
            "guard the whole chain with `spike_guard(inner)`",
        ),
    ),
    "dominant_layer": Advice(
        (
            "one tensor with much larger gradients: the clip of the whole then acts on "
            "it alone, and scales all others down with it",
            "a parameter of another scale, or one that the loss reaches directly",
        ),
        (
            "clip each layer relative to its own recent norms with "
            "`clip_by_leaf_history()`",
            "scale its gradient down before clipping, with `scale_gradients`",
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
    "several_runs": Advice(
        ("a file that is appended to by every start, or a job of several stages",),
        (
            "give each training a file of its own: `record_history` starts anew with "
            "the state of the optimizer",
        ),
    ),
}


# Keys of the history whose presence shows that a remedy is in place already.
_IN_PLACE = {
    "skip/": ("`spike_guard(inner)`", "`skip_spikes(inner)`"),
    "branch/": ("`branch_on_spike(inner)`",),
    "attention_clip/": ("`clip_attention_logits`",),
    "clip/limit": ("`clip_by_zscore()`",),
    "adam/eps_share": ("`safe_adamw`",),
    "accumulate/": ("`accumulate_moments`",),
    "microbatches/": ("bad microbatches with `microbatch_gradients`",),
}


def _not_in_place(history: History, remedies: tuple[str, ...]) -> tuple[str, ...]:
    """The remedies, without those that the run already has."""
    there = [
        call
        for key, calls in _IN_PLACE.items()
        if any(re.search(rf"(^|/){key}", column) for column in history.columns)
        for call in calls
    ]
    left = tuple(each for each in remedies if not any(call in each for call in there))
    return left or ("what helps is in place: inspect the data of this step",)


def finding(
    kind: Kind,
    history: History,
    row: int,
    metric: str,
    layer: str | None,
    evidence: str,
    more: Advice | None = None,
) -> Finding:
    """A finding, with the causes and remedies of its kind.

    Args:
      kind: the kind.
      history: the history; what it shows to be in place is not advised.
      row: the first abnormal row.
      metric: the key that shows the problem.
      layer: the layer that was affected first.
      evidence: values and limits.
      more: causes and remedies that are likelier than the usual ones of this kind.
    """
    causes, remedies = ADVICE[kind]
    words = WORDS[kind]
    if more is not None:
        causes, remedies = more.causes + causes, more.remedies + remedies
    step = int(history.steps[row])
    remedies = _not_in_place(history, remedies)
    return Finding(kind, metric, step, layer, evidence, causes, remedies, words)
