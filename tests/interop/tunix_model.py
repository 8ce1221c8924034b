"""A small model for Tunix, its batches, and a configuration of the trainer."""

import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.sft import peft_trainer


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
