"""The lines of docs/trainers/kauldron.md."""

# [guard]
import optax

import optax_stability as ost


def make_optimizer(learning_rate):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    guard = ost.spike_guard(chain, loss=False)
    return ost.record_history(guard, length=1024)


# [history]
def write_report(state, path):
    # After, or during, the training; state is what trainer.train() returns.
    ost.write_report(ost.history(state), path)


# [end]
