"""Gradient transformations that keep large-model training from collapsing.

See the README for the table *need → function → place in the chain*.
"""

from importlib.metadata import version as _version

from optax_stability import thresholds as thresholds
from optax_stability._accumulation._accumulation import (
    accumulate_moments as accumulate_moments,
)
from optax_stability._accumulation._accumulation import flush as flush
from optax_stability._accumulation._rates import (
    scale_learning_rate as scale_learning_rate,
)
from optax_stability._accumulation._state import (
    AccumulateMomentsState as AccumulateMomentsState,
)
from optax_stability._accumulation._state import has_updated as has_updated
from optax_stability._adam._adam import scale_by_safe_adam as scale_by_safe_adam
from optax_stability._adam._adamw import safe_adamw as safe_adamw
from optax_stability._adam._restarting import RestartMomentsState as RestartMomentsState
from optax_stability._adam._restarting import restart_moments as restart_moments
from optax_stability._adam._state import SafeAdamState as SafeAdamState
from optax_stability._adam._state import from_optax_adam_state as from_optax_adam_state
from optax_stability._adam._state import to_optax_adam_state as to_optax_adam_state
from optax_stability._clipping._clipping import (
    ClipByThresholdState as ClipByThresholdState,
)
from optax_stability._clipping._clipping import clip_by_threshold as clip_by_threshold
from optax_stability._clipping._presets import (
    clip_by_leaf_history as clip_by_leaf_history,
)
from optax_stability._clipping._presets import clip_by_quantile as clip_by_quantile
from optax_stability._clipping._presets import clip_by_zscore as clip_by_zscore
from optax_stability._core._metrics import metrics as metrics
from optax_stability._core._tree import leaf_names as leaf_names
from optax_stability._diagnosis._diagnose import diagnose as diagnose
from optax_stability._diagnosis._finding import Finding as Finding
from optax_stability._gradients._penalty import (
    penalize_gradient_norm as penalize_gradient_norm,
)
from optax_stability._gradients._scaling import scale_gradients as scale_gradients
from optax_stability._moments._microbatching import (
    microbatch_gradients as microbatch_gradients,
)
from optax_stability._moments._moments import Moments as Moments
from optax_stability._noise._batch_size import BatchSizeSchedule as BatchSizeSchedule
from optax_stability._noise._batch_size import (
    batch_size_schedule as batch_size_schedule,
)
from optax_stability._noise._estimation import (
    estimate_noise_scale as estimate_noise_scale,
)
from optax_stability._noise._reading import NoiseScale as NoiseScale
from optax_stability._noise._reading import batch_efficiency as batch_efficiency
from optax_stability._noise._reading import critical_batch_range as critical_batch_range
from optax_stability._noise._reading import noise_scale as noise_scale
from optax_stability._noise._scaling import (
    ScaleByNoiseScaleState as ScaleByNoiseScaleState,
)
from optax_stability._noise._scaling import scale_by_noise_scale as scale_by_noise_scale
from optax_stability._noise._state import (
    EstimateNoiseScaleState as EstimateNoiseScaleState,
)
from optax_stability._noise._when_noisy import WhenNoisyState as WhenNoisyState
from optax_stability._noise._when_noisy import when_noisy as when_noisy
from optax_stability._recording._histogram import histogram_edges as histogram_edges
from optax_stability._recording._history import RecordHistoryState as RecordHistoryState
from optax_stability._recording._history import history as history
from optax_stability._recording._history import record_history as record_history
from optax_stability._recording._recording import RecordState as RecordState
from optax_stability._recording._recording import record as record
from optax_stability._recovery._adoption import adopt_state as adopt_state
from optax_stability._recovery._rewinding import Decision as Decision
from optax_stability._recovery._rewinding import RewindPolicy as RewindPolicy
from optax_stability._report._plotting import plot_history as plot_history
from optax_stability._report._report import write_report as write_report
from optax_stability._spikes._branch_state import (
    BranchOnSpikeState as BranchOnSpikeState,
)
from optax_stability._spikes._branching import branch_on_spike as branch_on_spike
from optax_stability._spikes._eval_params import eval_params as eval_params
from optax_stability._spikes._skip_state import SkipSpikesState as SkipSpikesState
from optax_stability._spikes._skipping import skip_spikes as skip_spikes
from optax_stability._spikes._skipping import spike_guard as spike_guard

__version__ = _version("optax_stability")
