"""The lines of docs/trainers/maxtext.md."""

# [guard]
import optax

import optax_stability as ost


def guard_of_config(config, base_opt):
    # In get_optimizer, in place of its own skip_step_on_spikes.
    if getattr(config, "skip_step_on_spikes", False):
        chain = optax.chain(ost.clip_by_zscore(), base_opt)
        return ost.record_history(ost.spike_guard(chain), length=1024)
    return base_opt


# [metrics]
def add_guard_metrics(metrics, state):
    # Where train_step collects its metrics; state is the new one.
    for name, value in ost.metrics(state).items():
        if value.ndim == 0:
            metrics["scalar"][name] = value


# [end]
