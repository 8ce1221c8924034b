"""The lines of docs/trainers/kauldron.md; the test gives them the release's classes."""

# [imports]
import dataclasses

import flax
import numpy as np
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

    @flax.struct.dataclass
    class State(kd.metrics.State):
        numbers: dict

        @classmethod
        def empty(cls):
            return cls({})

        def merge(self, other):
            return self.replace(numbers=self.numbers | other.numbers)

        def compute(self):
            return {name: x for name, x in self.numbers.items() if np.isfinite(x)}

    def get_state(self, opt_state):
        found = ost.metrics(opt_state).items()
        return self.State({name: x for name, x in found if x.ndim == 0})


# [history]
def write_report(state, path):
    # After the training: state, _ = trainer.train()
    ost.write_report(ost.history(state), path)


# [end]
