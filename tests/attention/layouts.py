"""One small attention layer in the layouts that models have."""

import jax.numpy as jnp
import numpy as np

from optax_stability import AttentionHeads

WIDTH, HEADS, DIM = 8, 4, 3


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def separate(params):
    query, key = (params[name].reshape(WIDTH, -1, DIM) for name in ("q", "k"))
    return {"block": AttentionHeads(query, key)}


def fused(params):
    kernel = params["qkv"]["kernel"].reshape(WIDTH, HEADS, 3, DIM)
    bias = params["qkv"]["bias"].reshape(HEADS, 3, DIM)
    return {
        "block": AttentionHeads(
            query=kernel[:, :, 0],
            key=kernel[:, :, 1],
            scale=params["norm"]["scale"],
            bias=params["norm"]["bias"],
            query_bias=bias[:, 0],
            key_bias=bias[:, 1],
        )
    }


def heads_first(params):
    """[heads, head_dim, width], as Linen's attention transposed, one layer each."""
    return {
        name: AttentionHeads(*(jnp.transpose(layer[x], (2, 0, 1)) for x in ("q", "k")))
        for name, layer in params.items()
    }


def stacked(params):
    return {"blocks": AttentionHeads(params["q"], params["k"])}


def fused_params():
    return {
        "norm": {"scale": 1 + 0.1 * draw(3, WIDTH), "bias": draw(4, WIDTH)},
        "qkv": {
            "kernel": draw(5, WIDTH, 3 * HEADS * DIM),
            "bias": draw(6, 3 * HEADS * DIM),
        },
        "out": draw(7, HEADS * DIM, WIDTH),
    }


# Layout → the function of the user, and parameters.
LAYOUTS = {
    "separate": (
        separate,
        {"q": draw(0, WIDTH, HEADS * DIM), "k": draw(1, WIDTH, HEADS * DIM)},
    ),
    "grouped": (
        separate,
        {"q": draw(0, WIDTH, HEADS * DIM), "k": draw(1, WIDTH, 2 * DIM)},
    ),
    "fused": (fused, fused_params()),
    "heads first": (
        heads_first,
        {
            f"blocks/{i}": {x: draw(seed, HEADS, DIM, WIDTH) for x, seed in pair}
            for i, pair in enumerate([(("q", 0), ("k", 1)), (("q", 2), ("k", 3))])
        },
    ),
    "stacked": (
        stacked,
        {"q": draw(0, 2, WIDTH, HEADS, DIM), "k": draw(1, 2, WIDTH, HEADS, DIM)},
    ),
}
