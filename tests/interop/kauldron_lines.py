"""The lines of docs/trainers/kauldron.md; the test gives them the release's classes."""

# [imports]
import dataclasses

import jax.numpy as jnp
import optax
from kauldron import kd

import optax_stability as ost


# [guard]
def make_optimizer(learning_rate):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    guard = ost.spike_guard(chain, loss=False)
    return ost.record_history(guard, length=1024)


# [metrics]
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardMetrics(kd.metrics.Metric):
    opt_state: kd.kontext.Key = "opt_state"

    State = kd.metrics.TreeMap.State

    def get_state(self, opt_state):
        mean = kd.metrics.AverageState.from_values
        found = ost.metrics(opt_state).items()
        return self.State({k: mean(jnp.float32(x)) for k, x in found if not x.ndim})


# [history]
def write_report(state, path):
    # After the training: state, _ = trainer.train()
    ost.write_report(ost.history(state), path)


# [end]
