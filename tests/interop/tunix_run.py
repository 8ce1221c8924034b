"""A guarded run of Tunix: the lines of docs/trainers/tunix.md."""

# [imports]
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft import peft_trainer

import optax_stability as ost

SCHEDULE = optax.schedules.warmup_cosine_decay_schedule(1e-3, 1e-2, 5, 100)


# [before]
def make_trainer_before(model, loss_fn, config):
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))
    return peft_trainer.PeftTrainer(model, chain, config).with_loss_fn(loss_fn)


# [guard]
def guarded(learning_rate):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    return ost.record_history(ost.spike_guard(chain), length=1024)


def make_trainer(model, loss_fn, config):
    model.loss_probe = nnx.Param(ost.loss_probe())  # nnx.LoRAParam for adapters
    tx = optax.inject_hyperparams(guarded)(learning_rate=SCHEDULE)
    trainer = GuardedTrainer(model, ost.with_loss_probe(tx), config)
    return trainer.with_loss_fn(ost.probed(loss_fn))


# [metrics]
class GuardedTrainer(peft_trainer.PeftTrainer):
    def _post_process_train_step(self, aux):
        buffer = self._buffered_train_metrics.additional_metrics
        for name, value in ost.metrics(self.optimizer).items():
            if value.ndim == 0:  # without the vectors …/per_leaf
                # A copy, because the next step overwrites the optimizer's state.
                buffer[name] = ([jnp.copy(value)], np.mean)


# [accumulate]
def make_accumulating_trainer(model, loss_fn, config, every_k):
    # In place of gradient_accumulation_steps of the config.
    model.loss_probe = nnx.Param(ost.loss_probe())
    tx = ost.with_loss_probe(ost.spike_guard(ost.safe_adamw(SCHEDULE)))
    tx = ost.accumulate_moments(tx, every_k)
    trainer = GuardedTrainer(model, tx, config)
    return trainer.with_loss_fn(ost.probed(loss_fn))


# [norms]
def make_trainer_of_norms(model, loss_fn, config):
    tx = ost.spike_guard(ost.safe_adamw(SCHEDULE), loss=False)
    return GuardedTrainer(model, tx, config).with_loss_fn(loss_fn)


# [end]
