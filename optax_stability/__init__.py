"""Gradient transformations that keep large-model training from collapsing.

See the README for the table *need → function → place in the chain*.
"""

from importlib.metadata import version as _version

from optax_stability import thresholds as thresholds
from optax_stability._accumulation import accumulate_moments as accumulate_moments
from optax_stability._accumulation import flush as flush
from optax_stability._accumulation_state import (
    AccumulateMomentsState as AccumulateMomentsState,
)
from optax_stability._accumulation_state import has_updated as has_updated
from optax_stability._adam import scale_by_safe_adam as scale_by_safe_adam
from optax_stability._adam_state import SafeAdamState as SafeAdamState
from optax_stability._adam_state import from_optax_adam_state as from_optax_adam_state
from optax_stability._adam_state import to_optax_adam_state as to_optax_adam_state
from optax_stability._adamw import safe_adamw as safe_adamw
from optax_stability._adoption import adopt_state as adopt_state
from optax_stability._batch_size import BatchSizeSchedule as BatchSizeSchedule
from optax_stability._batch_size import batch_size_schedule as batch_size_schedule
from optax_stability._branch_state import BranchOnSpikeState as BranchOnSpikeState
from optax_stability._branching import branch_on_spike as branch_on_spike
from optax_stability._clip_presets import clip_by_leaf_history as clip_by_leaf_history
from optax_stability._clip_presets import clip_by_quantile as clip_by_quantile
from optax_stability._clip_presets import clip_by_zscore as clip_by_zscore
from optax_stability._clipping import ClipByThresholdState as ClipByThresholdState
from optax_stability._clipping import clip_by_threshold as clip_by_threshold
from optax_stability._diagnosis import Finding as Finding
from optax_stability._diagnosis import diagnose as diagnose
from optax_stability._eval_params import eval_params as eval_params
from optax_stability._gradient_penalty import (
    penalize_gradient_norm as penalize_gradient_norm,
)
from optax_stability._gradient_scaling import scale_gradients as scale_gradients
from optax_stability._histogram import histogram_edges as histogram_edges
from optax_stability._history import RecordHistoryState as RecordHistoryState
from optax_stability._history import history as history
from optax_stability._history import record_history as record_history
from optax_stability._metrics import metrics as metrics
from optax_stability._microbatching import microbatch_gradients as microbatch_gradients
from optax_stability._moments import Moments as Moments
from optax_stability._noise_reading import NoiseScale as NoiseScale
from optax_stability._noise_reading import batch_efficiency as batch_efficiency
from optax_stability._noise_reading import critical_batch_range as critical_batch_range
from optax_stability._noise_reading import noise_scale as noise_scale
from optax_stability._noise_scale import estimate_noise_scale as estimate_noise_scale
from optax_stability._noise_scale_state import (
    EstimateNoiseScaleState as EstimateNoiseScaleState,
)
from optax_stability._noise_scaling import (
    ScaleByNoiseScaleState as ScaleByNoiseScaleState,
)
from optax_stability._noise_scaling import scale_by_noise_scale as scale_by_noise_scale
from optax_stability._plotting import plot_history as plot_history
from optax_stability._rates import scale_learning_rate as scale_learning_rate
from optax_stability._recording import RecordState as RecordState
from optax_stability._recording import record as record
from optax_stability._report import write_report as write_report
from optax_stability._restarting import RestartMomentsState as RestartMomentsState
from optax_stability._restarting import restart_moments as restart_moments
from optax_stability._rewinding import Decision as Decision
from optax_stability._rewinding import RewindPolicy as RewindPolicy
from optax_stability._skip_state import SkipSpikesState as SkipSpikesState
from optax_stability._skipping import skip_spikes as skip_spikes
from optax_stability._skipping import spike_guard as spike_guard
from optax_stability._tree import leaf_names as leaf_names
from optax_stability._when_noisy import WhenNoisyState as WhenNoisyState
from optax_stability._when_noisy import when_noisy as when_noisy

__version__ = _version("optax_stability")
