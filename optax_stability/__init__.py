"""Optax gradient transformations that keep the training of large models stable.

``docs/start/cheat_sheet.md`` has the table *need → function → place in the chain*.
"""

from importlib.metadata import version as _version

from optax_stability import thresholds
from optax_stability._accumulation._accumulation import (
    accumulate_moments,
    flush,
)
from optax_stability._accumulation._rates import (
    scale_learning_rate,
)
from optax_stability._accumulation._state import (
    AccumulateMomentsState,
    has_updated,
)
from optax_stability._adam._adam import scale_by_safe_adam
from optax_stability._adam._adamw import safe_adamw
from optax_stability._adam._restarting import RestartMomentsState, restart_moments
from optax_stability._adam._state import (
    SafeAdamState,
    from_optax_adam_state,
    to_optax_adam_state,
)
from optax_stability._attention._bound import attention_logit_bound
from optax_stability._attention._clipping import (
    ClipAttentionLogitsState,
    clip_attention_logits,
)
from optax_stability._attention._heads import AttentionHeads
from optax_stability._attention._recording import (
    RecordLogitBoundState,
    record_logit_bound,
)
from optax_stability._checking._check import check
from optax_stability._clipping._clipping import (
    ClipByThresholdState,
    clip_by_threshold,
)
from optax_stability._clipping._presets import (
    clip_by_leaf_history,
    clip_by_quantile,
    clip_by_zscore,
)
from optax_stability._core._metrics import metrics
from optax_stability._core._tree import leaf_names
from optax_stability._diagnosis._alerting import FindingAlert
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import Finding
from optax_stability._gradients._loss_probe import (
    loss_probe,
    probed,
    with_loss_probe,
)
from optax_stability._gradients._penalty import (
    penalize_gradient_norm,
)
from optax_stability._gradients._scaling import scale_gradients
from optax_stability._moments._microbatching import (
    microbatch_gradients,
)
from optax_stability._moments._moments import Moments
from optax_stability._moments._signs import SignMoments
from optax_stability._noise._batch_size import (
    BatchSizeSchedule,
    batch_size_schedule,
)
from optax_stability._noise._estimation import (
    estimate_noise_scale,
)
from optax_stability._noise._reading import (
    NoiseScale,
    batch_efficiency,
    critical_batch_range,
    noise_scale,
)
from optax_stability._noise._scaling import (
    ScaleByNoiseScaleState,
    scale_by_noise_scale,
)
from optax_stability._noise._state import (
    EstimateNoiseScaleState,
)
from optax_stability._noise._when_noisy import WhenNoisyState, when_noisy
from optax_stability._recording._extra import RecordExtraState, record_extra
from optax_stability._recording._histogram import histogram_edges
from optax_stability._recording._history import (
    RecordHistoryState,
    history,
    record_history,
)
from optax_stability._recording._recording import RecordState, record
from optax_stability._recording._run_log import RunLog, read_log
from optax_stability._recovery._adoption import adopt_state
from optax_stability._recovery._checksums import find_damage, write_checksums
from optax_stability._recovery._rewinding import Decision, RewindPolicy
from optax_stability._recovery._stopping import StopRequest
from optax_stability._recovery._verification import verify_step
from optax_stability._report._plotting import plot_history
from optax_stability._report._report import write_report
from optax_stability._spikes._branch_state import (
    BranchOnSpikeState,
)
from optax_stability._spikes._branching import branch_on_spike
from optax_stability._spikes._eval_params import eval_params
from optax_stability._spikes._skip_state import SkipSpikesState
from optax_stability._spikes._skipping import skip_spikes, spike_guard

__all__ = [
    "AccumulateMomentsState",
    "AttentionHeads",
    "BatchSizeSchedule",
    "BranchOnSpikeState",
    "ClipAttentionLogitsState",
    "ClipByThresholdState",
    "Decision",
    "EstimateNoiseScaleState",
    "Finding",
    "FindingAlert",
    "Moments",
    "NoiseScale",
    "RecordExtraState",
    "RecordHistoryState",
    "RecordLogitBoundState",
    "RecordState",
    "RestartMomentsState",
    "RewindPolicy",
    "RunLog",
    "SafeAdamState",
    "ScaleByNoiseScaleState",
    "SignMoments",
    "SkipSpikesState",
    "StopRequest",
    "WhenNoisyState",
    "accumulate_moments",
    "adopt_state",
    "attention_logit_bound",
    "batch_efficiency",
    "batch_size_schedule",
    "branch_on_spike",
    "check",
    "clip_attention_logits",
    "clip_by_leaf_history",
    "clip_by_quantile",
    "clip_by_threshold",
    "clip_by_zscore",
    "critical_batch_range",
    "diagnose",
    "estimate_noise_scale",
    "eval_params",
    "find_damage",
    "flush",
    "from_optax_adam_state",
    "has_updated",
    "histogram_edges",
    "history",
    "leaf_names",
    "loss_probe",
    "metrics",
    "microbatch_gradients",
    "noise_scale",
    "penalize_gradient_norm",
    "plot_history",
    "probed",
    "read_log",
    "record",
    "record_extra",
    "record_history",
    "record_logit_bound",
    "restart_moments",
    "safe_adamw",
    "scale_by_noise_scale",
    "scale_by_safe_adam",
    "scale_gradients",
    "scale_learning_rate",
    "skip_spikes",
    "spike_guard",
    "thresholds",
    "to_optax_adam_state",
    "verify_step",
    "when_noisy",
    "with_loss_probe",
    "write_checksums",
    "write_report",
]

__version__ = _version("optax_stability")
