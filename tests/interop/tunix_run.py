"""A guarded run of Tunix: the lines of docs/trainers/tunix.md, and a small model."""

# [imports]
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
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


class Model(nnx.Module):
    """The next token of a sequence, from the last one."""

    def __init__(self, rngs, *, lora=False):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 16, rngs=rngs)
        if lora:
            self.adapter = nnx.LoRA(8, 2, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x) + (self.adapter(x) if hasattr(self, "adapter") else 0)


def next_token_loss(model, tokens, factor):
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return factor * losses.mean()


def batches(number, factors=None):
    """Counting sequences; ``factors`` multiply the loss of some steps."""
    rng = np.random.default_rng(0)
    for step in range(number):
        start = rng.integers(0, 16, (4, 1))
        tokens = (start + np.arange(9)) % 16
        factor = np.float32((factors or {}).get(step, 1.0))
        yield {"tokens": tokens.astype(np.int32), "factor": factor}


def make_config(steps, folder=None, **options):
    return peft_trainer.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        checkpoint_root_directory=None if folder is None else str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1000),
        **options,
    )
