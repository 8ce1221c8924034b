"""The recommended chain in a Linen ``TrainState``, on bytes of Python's own sources.

``python examples/linen_train_state.py`` takes 20 seconds on two CPU cores and writes
``runs/linen/linen.png``. One batch is NaN on purpose: the guard skips its step.
"""

import argparse
import functools
import sys
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_stability as ost
from optax_stability.flax import TrainState

LENGTH, WIDTH, BATCH, MICROBATCHES = 32, 64, 32, 8


class ByteModel(nn.Module):
    """Logits of the next byte: two blocks of causal attention and a nonlinear layer."""

    @nn.compact
    def __call__(self, tokens):
        """Maps int[batch, length] to float32[batch, length, 256]."""
        dense = functools.partial(nn.Dense, use_bias=False)
        attention = functools.partial(nn.MultiHeadDotProductAttention, use_bias=False)
        place = self.param("place", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        x, mask = nn.Embed(256, WIDTH)(tokens) + place, nn.make_causal_mask(tokens)
        for i in range(2):
            x += attention(4, name=f"Attention_{i}")(nn.RMSNorm()(x), mask=mask)
            x += dense(WIDTH)(nn.gelu(dense(4 * WIDTH)(nn.RMSNorm()(x))))
        return dense(256)(nn.RMSNorm()(x))


def make_tx(steps: int) -> optax.GradientTransformation:
    """Measures, guards, clips, optimizes, and records the metrics of every step."""
    rate = optax.schedules.warmup_cosine_decay_schedule(0, 3e-3, 20, steps, 3e-4)
    clipped = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(rate))
    guarded = optax.chain(ost.estimate_noise_scale(), clipped, ost.record("update"))
    tx = optax.chain(ost.record("grad"), ost.spike_guard(guarded))
    return ost.record_history(tx, length=steps)


@jax.jit
def train_step(state: TrainState, tokens: jax.Array, weights: jax.Array):
    """The next state, the loss, and whether the guard skipped the step."""

    def loss_fn(params, batch):
        tokens, weights = batch
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        log_p = jnp.take_along_axis(nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -jnp.mean(weights[:, None, None] * log_p)

    gradients = ost.microbatch_gradients(loss_fn, MICROBATCHES)
    loss, grads, moments = gradients(state.params, (tokens, weights))
    extra_args = {"value": loss, "moments": moments}
    state = state.apply_gradients(grads=grads, extra_args=extra_args)
    return state, loss, ost.metrics(state)["skip/skipped"]


def main(out: Path, steps: int = 300) -> TrainState:
    """Trains, prints the progress, and plots the run."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(p.read_bytes() for p in sources), np.uint8)
    model, rng = ByteModel(), np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), np.ones((1, LENGTH), int))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make_tx(steps))
    for fault in ost.check(state, params):
        sys.stdout.write(f"order of the chain: {fault}\n")
    for step in range(1, steps + 1):
        starts = rng.integers(len(text) - LENGTH, size=(BATCH, 1))
        tokens = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
        weights = np.full(BATCH, np.nan if step == steps // 2 else 1, np.float32)
        state, loss, skipped = train_step(state, tokens, weights)
        if skipped or step % 50 == 0:
            note = "  skipped" if skipped else ""
            sys.stdout.write(f"step {step}  loss {loss:.3f}{note}\n")
    sys.stdout.write(f"{ost.noise_scale(state)!r}\n")
    ost.plot_history(ost.history(state), out / "linen.png")
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/linen"))
    main(parser.parse_args().out)
