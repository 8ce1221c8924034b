"""The lines of docs/trainers/levanter.md; the test gives them the release's classes."""

# [guard]
import dataclasses
import math

import optax
from levanter.optim import AdamConfig, OptimizerConfig

import optax_stability as ost


@OptimizerConfig.register_subclass("guarded_adam")
@dataclasses.dataclass(frozen=True)
class GuardedAdamConfig(AdamConfig):
    def build(self, num_train_steps):
        def guarded(learning_rate):
            adam = ost.safe_adamw(
                learning_rate, self.beta1, self.beta2, weight_decay=self.weight_decay
            )
            return ost.spike_guard(optax.chain(ost.clip_by_zscore(), adam))

        schedule = self.lr_scheduler(num_train_steps)
        return optax.inject_hyperparams(guarded)(learning_rate=schedule)


# [metrics]
def log_guard(step_info):
    import levanter.tracker

    metrics = ost.metrics(step_info.state.opt_state)
    values = {name: float(x) for name, x in metrics.items() if x.ndim == 0}
    finite = {name: x for name, x in values.items() if math.isfinite(x)}
    levanter.tracker.log(finite, step=step_info.step)


# [end]
