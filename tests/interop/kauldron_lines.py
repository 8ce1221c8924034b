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
    # After the training: state, _ = trainer.train()
    ost.write_report(ost.history(state), path)


# [end]
