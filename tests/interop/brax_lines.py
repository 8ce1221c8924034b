"""The lines of docs/trainers/brax.md."""

# [guard]
import optax

import optax_stability as ost


def make_optimizer(learning_rate):
    adam = ost.safe_adamw(learning_rate, weight_decay=0)  # brax gives no parameters
    return ost.spike_guard(optax.chain(ost.clip_by_zscore(), adam), loss=False)


# [end]
