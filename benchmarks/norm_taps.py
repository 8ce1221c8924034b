"""What the norms of single examples' gradients cost in a step of training.

``per_example_gradients`` stands in the place of ``nnx.value_and_grad``, on a GPT like
that of ``examples/gpt`` whose layers can have norm taps. Beside it stand the same norms
by ``jax.vmap`` over the examples, which needs no taps but the gradients of all examples
in memory.

All sides run in one process, taking turns call by call, and are compared as medians of
the ratios of neighbouring calls. Memory comes from XLA's analysis of the compiled
program; operations from that of the program for GPUs, where taps need no loop: XLA
counts the body of a loop once.

Run by ``python benchmarks/noise_scale.py``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from accumulation import (
    QUICK,
    SMALL,
    Program,
    build,
    compare,
    run_alternately,
)
from flax import nnx
from reporting import Report, markdown, quartiles
from step_cost import LEARNING_RATE, count, summary

import optax_stability as ost
from optax_stability.flax import (
    Embed,
    LayerNorm,
    Linear,
    microbatch_gradients,
    per_example_gradients,
)

PLAIN, BY_SCAN = "value_and_grad", "scan over examples"


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
      shape: (layers, width, heads, context, vocabulary) of the GPT.
      rows: examples per batch.
      rounds: timed steps of every side.
    """

    shape: tuple[int, ...]
    rows: int
    rounds: int


FULL = Scale(SMALL, rows=8, rounds=31)
SMALLEST = Scale(QUICK.steps["0.3M"][0], rows=4, rounds=3)


# --- the model, as in examples/gpt/model.py but of layers that can have taps ----------


class Block(nnx.Module):
    """Attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        """Initialises at nnx's defaults: what is measured does not depend on it."""
        self.heads = heads
        self.attention_norm = LayerNorm(width, rngs=rngs)
        self.query_key_value = Linear(width, 3 * width, rngs=rngs)
        self.attention_out = Linear(width, width, rngs=rngs)
        self.mlp_norm = LayerNorm(width, rngs=rngs)
        self.mlp_in = Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = Linear(4 * width, width, rngs=rngs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Mixes every position with those before it."""
        batch, length, width = x.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(self.query_key_value(x).reshape(split), 2, 0)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.reshape(x.shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds both branches to the residual stream ``x[batch, length, width]``."""
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nnx.Module):
    """Predicts the next token at every position; the head is the embedding."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs):
        """Makes a model of (layers, width, heads, context, vocabulary)."""
        layers, width, heads, context, vocabulary = shape
        self.tokens = Embed(vocabulary, width, rngs=rngs)
        self.positions = Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.final_norm = LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int[batch, length] to logits."""
        # Taps want to know which example a position belongs to.
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.final_norm(x))


def next_token_loss(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy on int[batch, context + 1]."""
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# --- the sides ------------------------------------------------------------------------


def plain(model: GPT, windows: jax.Array) -> tuple[Any, Any, Any]:
    """What a step is without norms."""
    return *nnx.value_and_grad(next_token_loss)(model, windows), None


def by_vmap(model: GPT, windows: jax.Array) -> tuple[Any, Any, Any]:
    """Every example a microbatch, all at once."""
    return microbatch_gradients(next_token_loss, len(windows))(model, windows)


def by_scan(model: GPT, windows: jax.Array) -> tuple[Any, Any, Any]:
    """Every example a microbatch, one after the other."""
    fn = microbatch_gradients(next_token_loss, len(windows), vmap_size=1)
    return fn(model, windows)


SIDES: dict[str, Callable] = {
    PLAIN: plain,
    "norm layers": per_example_gradients(next_token_loss, only=(LayerNorm,)),
    "all layers": per_example_gradients(next_token_loss),
    "vmap over examples": by_vmap,
    BY_SCAN: by_scan,
}


def build_side(side: Callable, model: GPT, windows: jax.Array) -> Program:
    """A step of a trainer, compiled; it hands out the deviations."""
    graph, params = nnx.split(model)
    tx = ost.safe_adamw(LEARNING_RATE)

    def step(params, state, windows):
        loss, grads, moments = side(nnx.merge(graph, params), windows)
        updates, state = tx.update(nnx.as_pure(grads), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, (loss, moments)

    params = nnx.as_pure(params)
    return build(step, params, tx.init(params), windows)


def operations(side: Callable, model: GPT, windows: jax.Array) -> float:
    """What one evaluation takes, as XLA counts it; too few if there is a loop."""
    graph, params = nnx.split(model)

    def evaluate(params, windows):
        return side(nnx.merge(graph, params), windows)

    traced = jax.jit(evaluate).trace(params, windows)
    costs = traced.lower(lowering_platforms=("cuda",)).cost_analysis()
    if costs is None:
        raise RuntimeError("this backend does not analyse its programs")
    return costs["flops"]


def measure(scale: Scale) -> dict[str, Any]:
    """Time and memory of every side."""
    model = GPT(scale.shape, nnx.Rngs(0))
    windows = (scale.rows, 1 + scale.shape[3])
    batch = jax.random.randint(jax.random.key(1), windows, 0, scale.shape[4])
    programs = {name: build_side(side, model, batch) for name, side in SIDES.items()}
    seconds = run_alternately(programs, scale.rounds, 1)
    first, rows = operations(SIDES[PLAIN], model, batch), {}
    for name, program in programs.items():
        temp = program.step.memory_analysis().temp_size_in_bytes
        flops = operations(SIDES[name], model, batch)
        rows[name] = {
            "parameters": count(program.arguments[0]),
            "ms": summary(list(seconds[name].ravel()), 1e3),
            "time_ratio": compare(seconds[name].ravel(), seconds[PLAIN].ravel()),
            "temp_mb": round(temp / 1e6, 2),
            "flops_ratio": None if name == BY_SCAN else round(flops / first, 4),
        }
    return rows


def readme_table(report: Report) -> str:
    """From single examples, in the report of ``noise_scale.py``."""
    return table(report["examples"])


def table(rows: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for name, row in rows.items():
        flops = "–" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}"
        time = quartiles(row["time_ratio"], 2)
        cells = [f"{row['ms']['median']:.0f}", time, flops, f"{row['temp_mb']:.1f}"]
        lines.append([name, *cells])
    return markdown(["step with", "ms", "time", "flops", "temp MB"], lines)
