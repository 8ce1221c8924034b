"""The lines of docs/trainers/brax.md."""

# [guard]
import optax

import optax_stability as ost


def make_optimizer(learning_rate, axis_name=None):
    chain = optax.chain(
        ost.clip_by_zscore(axis_name=axis_name),
        ost.scale_by_safe_adam(),
        optax.scale_by_learning_rate(learning_rate),
    )
    return ost.spike_guard(chain, loss=False, axis_name=axis_name)


# [end]
