"""A GPT in Flax NNX, with the architecture of GPT-2.

Pre-norm blocks, learned positions, GELU, causal attention, and an output head that
shares its matrix with the token embedding. Parameters are float32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

INIT_STD = 0.02
# Token embeddings start larger than all other parameters, so that the first, large
# steps of Adam do not erase the differences between tokens.
TOKEN_STD = 0.3
# How the devices of a mesh share the parameters (Shoeybi et al. 2019, "Megatron-LM"):
# along "model" each has some attention heads, some neurons of the perceptron and some
# tokens of the vocabulary; along "fsdp" each has some rows or columns.
SPLIT = {
    "tokens/embedding": ("model", "fsdp"),
    "positions/embedding": (None, "fsdp"),
    "query_key_value/kernel": ("fsdp", "model"),
    "query_key_value/bias": ("model",),
    "attention_out/kernel": ("model", "fsdp"),
    "mlp_in/kernel": ("fsdp", "model"),
    "mlp_in/bias": ("model",),
    "mlp_out/kernel": ("model", "fsdp"),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a model."""

    layers: int
    width: int  # of the residual stream
    heads: int  # per block; divides width
    context: int  # longest sequence, in tokens
    vocabulary: int  # minimum; data with more ids needs a larger vocabulary
    learning_rate: float  # default peak of the schedule
    qk_norm: bool = False  # whether queries and keys are normalised

    def flops_per_token(self, parameters: int) -> float:
        """FLOPs of a training step: 2 forward and 4 backward per weight and token.

        Attention adds 12 per position of the context and channel, without regard to the
        causal mask (Chowdhery et al. 2022, "PaLM", appendix B).
        """
        return 6 * parameters + 12 * self.layers * self.width * self.context


SIZES = {
    "tiny": Size(4, 128, 4, 128, 256, 3e-3),
    "small": Size(6, 384, 6, 256, 256, 1e-3),
    "gpt2": Size(12, 768, 12, 1024, 50304, 6e-4),
}


def _split_first(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the sharding: only the first dimension is split, over these axes.

    Without it, the compiler might move activations instead of split parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis in mesh.axis_names)
    if mesh.empty or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x  # There may be fewer examples than devices.
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def _by_example(x: jax.Array) -> jax.Array:
    return _split_first(x, "data", "fsdp")


def _linear(fan_in: int, fan_out: int, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
    init = nnx.initializers.normal(std)
    return nnx.Linear(fan_in, fan_out, kernel_init=init, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, size: Size, dtype: DTypeLike, rngs: nnx.Rngs):
        """Initialises as GPT-2 does; computes in ``dtype`` on float32 parameters."""
        width, dim = size.width, size.width // size.heads
        # The residual stream is a sum of 2·layers branches; this keeps its scale.
        residual_std = INIT_STD / (2 * size.layers) ** 0.5
        self.heads = size.heads
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.query_key_value = _linear(width, 3 * width, INIT_STD, dtype, rngs)
        # Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters".
        norm = functools.partial(nnx.LayerNorm, dim, use_bias=False, dtype=dtype)
        self.query_norm = norm(rngs=rngs) if size.qk_norm else jax.nn.identity
        self.key_norm = norm(rngs=rngs) if size.qk_norm else jax.nn.identity
        self.attention_out = _linear(width, width, residual_std, dtype, rngs)
        self.mlp_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp_in = _linear(width, 4 * width, INIT_STD, dtype, rngs)
        self.mlp_out = _linear(4 * width, width, residual_std, dtype, rngs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Causal self-attention."""
        batch, length, width = x.shape
        # Heads first, so that a device has query, key and value of its own heads.
        split = (batch, length, self.heads, 3, width // self.heads)
        each = self.query_key_value(x).reshape(split)
        if each.dtype == jnp.float16:  # CPUs do not support attention in float16.
            each = each.astype(jnp.float32)
        query, key, value = jnp.moveaxis(each, 3, 0)
        query, key = self.query_norm(query), self.key_norm(key)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.reshape(x.shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds both branches to the residual stream ``x[batch, length, width]``."""
        x = _by_example(x + self.attend(self.attention_norm(x)))
        changed = self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))
        return _by_example(x + changed)


class GPT(nnx.Module):
    """Predicts the next token at every position."""

    def __init__(self, size: Size, vocabulary: int, dtype: DTypeLike, rngs: nnx.Rngs):
        """Initialises so that all tokens are equally likely: loss = ln(vocabulary)."""
        self.dtype, width, normal = dtype, size.width, nnx.initializers.normal
        self.tokens = nnx.Embed(
            vocabulary, width, embedding_init=normal(TOKEN_STD), dtype=dtype, rngs=rngs
        )
        self.positions = nnx.Embed(
            size.context, width, embedding_init=normal(INIT_STD), dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(size, dtype, rngs) for _ in range(size.layers)])
        # The residual stream is close to the embedding of the current token, and the
        # head shares that embedding: at scale 1 the initial model would predict that
        # every token repeats. At scale 0 all tokens are equally likely.
        zeros = nnx.initializers.zeros
        self.final_norm = nnx.LayerNorm(width, scale_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int[batch, length] to logits, float32[batch, length, vocabulary]."""
        # The table is gathered, like other parameters; lookups are split by example.
        table = _split_first(self.tokens.embedding[...], "model").astype(self.dtype)
        positions = self.positions.embedding[: tokens.shape[1]].astype(self.dtype)
        x = _by_example(jnp.take(table, tokens, axis=0) + positions)
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.final_norm(x)).astype(jnp.float32)


def window_losses(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of each window of int[batch, context + 1], in nats a token."""
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(axis=-1)


def next_token_loss(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of all windows, in nats per token."""
    return window_losses(model, windows).mean()
