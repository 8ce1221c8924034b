"""One run: a small GPT with Adam, compiled once for many settings."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_stability as ost
from early_warning.data import batches_of, held_out_of
from early_warning.settings import Setting
from early_warning.trace import Trace, look

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))


def without_norms(model: Any) -> None:
    """Takes the layer norms out of a model."""
    from flax import nnx

    class Nothing(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    model.final_norm = Nothing()
    for block in model.blocks:
        block.attention_norm, block.mlp_norm = Nothing(), Nothing()


def start_as_gpt2(model: Any) -> None:
    """Tokens as loud as the other matrices, and a head that is not silent."""
    from model import INIT_STD, TOKEN_STD

    model.tokens.embedding[...] *= INIT_STD / TOKEN_STD
    model.final_norm.scale[...] += 1


def rate_at(step, peak, setting: Setting, steps: int):
    """Linear warm-up, then a cosine."""
    done = (step - setting.warmup) / (steps - setting.warmup)
    cosine = setting.final + (1 - setting.final) * (1 + jnp.cos(jnp.pi * done)) / 2
    return peak * jnp.where(done < 0, step / setting.warmup, cosine)


@functools.cache
def trainer(shape: Setting) -> Callable[..., tuple[Trace, jax.Array]]:
    """Compiles ``(setting, rate, key, batches, held_out) -> (Trace, loss)`` once.

    All that is not the shape of the model or the batch is an argument of the program,
    so that one serves many settings.
    """
    from flax import nnx
    from model import GPT, Size, next_token_loss

    size = Size(shape.layers, shape.width, shape.width // 32, 64, 256, 0.0)

    def train(setting, rate, key, batches, held_out):
        model = GPT(size, size.vocabulary, jnp.float32, nnx.Rngs(params=key))
        if not shape.zero_head:
            start_as_gpt2(model)
        if not shape.normalised:
            without_norms(model)
        structure, params = nnx.split(model)
        names = ost.leaf_names(params)
        early = jnp.array([x.startswith(("positions", "blocks/0/")) for x in names])
        adam = ost.scale_by_safe_adam(setting.b1, setting.b2, setting.eps)

        def loss_of(params, batch):
            return next_token_loss(nnx.merge(structure, params), batch)

        def step(carry, data):
            params, state, last = carry
            t, batch = data
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            norm = optax.tree.norm(grads)
            grads = optax.tree.scale(jnp.minimum(1, setting.clip / norm), grads)
            u, state = adam.update(grads, state)
            now = rate_at(t, rate, setting, len(batches))
            change = jax.tree.map(
                lambda u, p: -now * (u + setting.weight_decay * p), u, params
            )
            seen = look(loss, norm, grads, last, u, change, params, state, early)
            params = optax.apply_updates(params, change)
            return (params, state, grads), seen

        start = params, adam.init(params), optax.tree.zeros_like(params)
        data = jnp.arange(len(batches)), batches
        (params, _, _), trace = jax.lax.scan(step, start, data)
        return trace, jax.lax.map(lambda x: loss_of(params, x), held_out).mean()

    return jax.jit(train)


def run(setting: Setting, rate: float, seed: int, steps: int) -> tuple[Trace, float]:
    """Trains once: the trace, as NumPy, and the held-out loss at the end."""
    traced = setting._replace(
        data=0, layers=0, width=0, batch=0, normalised=0, zero_head=0
    )
    trace, loss = trainer(setting.shape)(
        traced,
        rate,
        jax.random.key(seed),
        batches_of(setting, seed, steps),
        held_out_of(setting),
    )
    return jax.device_get(trace), float(loss)
