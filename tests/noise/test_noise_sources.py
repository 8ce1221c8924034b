"""All sources of the noise scale agree: examples, taps, steps, calls and devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import collectives, place
from tiers import full

import optax_stability as ost
from optax_stability import flax as ost_flax

# What costs much to make is made in one worker.
pytestmark = pytest.mark.xdist_group("noise sources")

ROWS, LENGTH, WIDTH, WORDS, K, STEPS = 64, 6, 16, 11, 8, 24


class Transformer(nnx.Module):
    """Causal attention and a perceptron, with a head of its own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens = ost_flax.Embed(WORDS, WIDTH, rngs=rngs)
        self.norm = ost_flax.LayerNorm(WIDTH, rngs=rngs)
        self.query_key_value = ost_flax.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.mlp_in = ost_flax.Linear(WIDTH, WIDTH, rngs=rngs)
        self.final_norm = ost_flax.RMSNorm(WIDTH, rngs=rngs)
        self.head = ost_flax.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens)
        query, key, value = jnp.split(self.query_key_value(self.norm(x)), 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", query, key) / WIDTH**0.5
        causal = np.tri(tokens.shape[1], dtype=bool)
        x = x + jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ value
        return self.head(self.final_norm(x + jax.nn.gelu(self.mlp_in(x))))


def loss_fn(model, tokens):
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


@functools.cache
def model():
    return nnx.split(Transformer())


def pure_loss(params, tokens):
    return loss_fn(nnx.merge(model()[0], params), tokens)


@functools.cache
def batches():
    """Words of unequal frequency, each likely to be followed by the next one."""
    rng = np.random.default_rng(0)
    first = rng.choice(WORDS, (STEPS, ROWS, 1), p=np.arange(1, WORDS + 1) / 66)
    forward = rng.random((STEPS, ROWS, LENGTH)) < 0.7
    steps = np.where(forward, 1, rng.integers(0, WORDS, forward.shape))
    return ((first + np.cumsum(steps, -1)) % WORDS).astype(np.int32)


CHAIN = optax.chain(ost.estimate_noise_scale(decay=1 - 1e-6), optax.sgd(0.0))


def estimate(gradients):
    """The noise scale of the whole and by leaf, from one step per batch."""
    params = model()[1]

    @jax.jit
    def step(state, tokens):
        _, grads, moments = gradients(params, tokens)
        return CHAIN.update(grads, state, params, moments=moments)[1]

    state = CHAIN.init(params)
    for tokens in batches():
        state = step(state, tokens)
    return ost.noise_scale(state)


def through_nnx(gradients):
    """Takes parameters in the place of a model."""
    return lambda params, tokens: gradients(nnx.merge(model()[0], params), tokens)


@functools.cache
def every_example():
    return estimate(ost.microbatch_gradients(pure_loss, ROWS))


@functools.cache
def in_the_step():
    return estimate(ost.microbatch_gradients(pure_loss, K))


def taps():
    return estimate(through_nnx(ost_flax.per_example_gradients(loss_fn)))


def across_steps():
    """Microbatch k has the rows k, k + K and so on, as in the step."""
    tx = ost.accumulate_moments(CHAIN, K, mean_square=False)
    params, state = model()[1], tx.init(model()[1])

    @jax.jit
    def step(state, tokens):
        grads = jax.grad(pure_loss)(params, tokens)
        return tx.update(grads, state, params, weight=float(ROWS // K))[1]

    for tokens in batches():
        for k in range(K):
            state = step(state, tokens[k::K])
    return ost.noise_scale(state)


def across_devices():
    mesh = jax.make_mesh((K,), ("data",), axis_types=(AxisType.Auto,))
    gradients = ost.microbatch_gradients(pure_loss, K, spmd_axis_name="data")
    # On a device rows are neighbours; these are k, k + K and so on.
    order = np.arange(ROWS).reshape(-1, K).T.ravel()
    along = NamedSharding(mesh, PartitionSpec("data"))

    def sharded(params, tokens):
        rows = jax.lax.with_sharding_constraint(tokens[order], along)
        return gradients(params, rows)

    with jax.set_mesh(mesh):
        return estimate(sharded)


def both_nested():
    """Two calls of four microbatches each."""
    tx = ost.accumulate_moments(CHAIN, 2, mean_square=False)
    gradients = ost.microbatch_gradients(pure_loss, K // 2)
    params, state = model()[1], tx.init(model()[1])

    @jax.jit
    def step(state, tokens):
        _, grads, moments = gradients(params, tokens)
        return tx.update(grads, state, params, moments=moments)[1]

    for tokens in batches():
        parts = [tokens[k::K] for k in range(K)]
        for half in (parts[: K // 2], parts[K // 2 :]):
            state = step(state, np.stack(half, 1).reshape(ROWS // 2, -1))
    return ost.noise_scale(state)


SAME = {
    "taps": (taps, every_example),
    "across steps": (across_steps, in_the_step),
    "across devices": (across_devices, in_the_step),
    "both nested": (both_nested, in_the_step),
}


@pytest.mark.parametrize(("source", "reference"), SAME.values(), ids=SAME)
@full
def test_the_same_parts_give_the_same_numbers(source, reference):
    found, expected = source(), reference()
    leaves = {"": (found, expected)}
    for name, leaf in expected.per_leaf.items():
        leaves[name] = (found.per_leaf[name], leaf)
    for name, pair in leaves.items():
        for key in ("trace", "grad_sq", "low", "noise_to_weight"):
            one, other = (getattr(each, key) for each in pair)
            # G² is a difference: its errors are relative to what it is of.
            atol = 1e-4 * pair[1].trace / ROWS if key == "grad_sq" else 0
            np.testing.assert_allclose(
                one, other, rtol=1e-3, atol=atol, err_msg=f"{name} {key}"
            )


@full
def test_parts_of_any_size_estimate_the_same():
    """Of 64 parts and of 8 they differ by chance, as their intervals say."""
    fine, coarse = every_example(), in_the_step()
    assert fine.valid
    assert coarse.valid
    assert 1 < fine.b_simple < 1000
    both = [(each.high - each.low) / (2 * 2.07) for each in (fine, coarse)]
    assert abs(fine.b_simple - coarse.b_simple) < 4 * math.hypot(*both)
    # The trace of the finer one is of 64 parts, and far less uncertain.
    np.testing.assert_allclose(coarse.trace, fine.trace, rtol=0.1)


# --- what it costs over devices ------------------------------------------------------


def mlp(params, x):
    hidden = jnp.tanh(x @ params["in"])
    return jnp.mean(jnp.square(hidden @ params["out"] + params["bias"] - 1))


def compile_step(gradients, tx):
    """A step on eight devices, and what XLA says of it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {
        "in": np.ones((64, 128), np.float32),
        "out": np.ones((128, 64), np.float32),
        "bias": np.zeros(64, np.float32),
    }

    def step(params, state, x):
        loss, grads, moments = gradients(params, x)
        updates, state = tx.update(grads, state, params, value=loss, moments=moments)
        return optax.apply_updates(params, updates), state, ost.metrics(state)

    with jax.set_mesh(mesh):
        params, state = place(params, mesh), place(tx.init(params), mesh)
        x = place(np.ones((512, 64), np.float32), mesh, "data")
        step = jax.jit(step, donate_argnums=(0, 1))
        return step.lower(params, state, x).compile()


@pytest.mark.parametrize("parts", [8, 16])
@full
def test_over_devices_it_sends_one_gradient_and_two_small_messages(parts):
    adam = ost.safe_adamw(1e-3)
    noisy = optax.chain(ost.estimate_noise_scale(), ost.clip_by_zscore(), adam)
    gradients = ost.microbatch_gradients(mlp, parts, vmap_size=8, spmd_axis_name="data")
    sent = collectives(compile_step(gradients, ost.spike_guard(noisy)))
    assert {operation for operation, _ in sent} == {"all-reduce"}
    sizes = sorted(sum(map(math.prod, shapes)) for _, shapes in sent)
    parameters = 2 * 64 * 128 + 64
    assert parameters <= sizes[-1] < parameters + 8
    assert len(sizes) <= 3
    assert sizes[-2] <= 8


@full
def test_over_devices_there_is_no_second_backward_pass():
    def plain(params, x):
        return *jax.value_and_grad(mlp)(params, x), None

    gradients = ost.microbatch_gradients(mlp, 8, spmd_axis_name="data")
    adam = optax.with_extra_args_support(ost.safe_adamw(1e-3))
    noisy = optax.chain(ost.estimate_noise_scale(), adam)
    flops = [
        compile_step(*each).cost_analysis()["flops"]
        for each in ((plain, adam), (gradients, noisy))
    ]
    # A backward pass is two thirds of all; what is counted per parameter is Adam's and
    # a dozen operations of ours, here beside 64 rows only.
    assert flops[1] < 1.15 * flops[0]
