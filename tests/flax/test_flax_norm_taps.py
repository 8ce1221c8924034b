"""Moments of every example from one backward pass, against every example's gradient."""

from functools import cache, partial

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import full, quick_only

import optax_stability as ost
from optax_stability.flax import (
    Embed,
    LayerNorm,
    Linear,
    NormTap,
    RMSNorm,
    microbatch_gradients,
    per_example_gradients,
)

# Of the sums whose difference a deviation is: a few hundred products of both signs per
# sum, each rounded to 2⁻²⁴ of its size, through two blocks of six layers.
RTOL = 2e-5
BATCH, LENGTH, WIDTH, WORDS = 4, 6, 8, 7


class Block(nnx.Module):
    """Causal attention of one head and a perceptron, before each a normalisation."""

    def __init__(self, rngs, dtype=None):
        options = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = LayerNorm(WIDTH, **options)
        self.query_key_value = Linear(WIDTH, 3 * WIDTH, use_bias=False, **options)
        self.attention_out = Linear(WIDTH, WIDTH, **options)
        self.mlp_norm = RMSNorm(WIDTH, **options)
        self.mlp_in = Linear(WIDTH, 2 * WIDTH, **options)
        self.mlp_out = Linear(2 * WIDTH, WIDTH, **options)

    def attend(self, x):
        query, key, value = jnp.split(self.query_key_value(x), 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", query, key) / WIDTH**0.5
        causal = np.tri(x.shape[1], dtype=bool)
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        return self.attention_out(jnp.einsum("bqk,bkd->bqd", weights, value))

    def __call__(self, x):
        x = x + self.attend(self.attention_norm(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


def in_turn(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class Layer(nnx.Module):
    """What compiles in a fraction of the time of a block."""

    def __init__(self, rngs, dtype=None):
        self.norm = LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.linear = Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


class Transformer(nnx.Module):
    """A tiny one; its head is the embedding unless ``tied`` is False."""

    def __init__(self, kind=Layer, *, layers=1, tied=True, dtype=None, run=in_turn):
        rngs = nnx.Rngs(0)
        options = {"dtype": dtype, "rngs": rngs}
        self.tokens = Embed(WORDS, WIDTH, **options)
        self.positions = Embed(LENGTH, WIDTH, **options)
        self.blocks = nnx.List([kind(rngs, dtype) for _ in range(layers)])
        self.final_norm = RMSNorm(WIDTH, **options)
        self.head = None if tied else Linear(WIDTH, WORDS, use_bias=False, **options)
        self.run = run

    def __call__(self, tokens):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        x = self.final_norm(self.run(self.blocks, x))
        return self.tokens.attend(x) if self.head is None else self.head(x)


def loss_fn(model, windows):
    logits = model(windows[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return jnp.mean(losses)


WINDOWS = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, WORDS)


class Pair(nnx.Module):
    """Two maps, of which a loss can make what it likes; compiles in no time."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = (Linear(3, 3, rngs=rngs) for _ in range(2))


ROWS = jax.random.normal(jax.random.key(0), (BATCH, 5, 3))


def both(model, x):
    """What happens in a pair as a rule."""
    return jnp.tanh(model.second(jnp.tanh(model.first(x))))


def pair_loss(model, x):
    return jnp.mean(both(model, x) ** 2)


def by_taps(model, batch=WINDOWS, loss_fn=loss_fn, **options):
    return nnx.jit(per_example_gradients(loss_fn, **options))(model, batch)


def one_by_one(model, batch=WINDOWS, loss_fn=loss_fn, **options):
    return nnx.jit(microbatch_gradients(loss_fn, BATCH, **options))(model, batch)


@cache
def usual():
    """Moments of the smallest model, by taps."""
    return by_taps(Transformer())[2]


def by_name(moments, vector):
    return dict(zip(ost.leaf_names(moments.leaves), vector, strict=True))


def assert_moments_close(found, expected, rtol=RTOL):
    """Every deviation agrees relative to the sums whose difference it is."""
    size = expected.deviation + expected.weight * jnp.square(expected.norm)
    names = ost.leaf_names(expected.leaves)
    assert ost.leaf_names(found.leaves) == names
    errors = np.asarray(jnp.abs(found.deviation - expected.deviation) / size)
    assert (errors < rtol).all(), dict(zip(names, errors, strict=True))
    np.testing.assert_allclose(found.norm, expected.norm, rtol=rtol)
    assert int(found.num_microbatches) == int(expected.num_microbatches)
    assert float(found.weight) == float(expected.weight)
    assert found.mean_square is None


def unknown(moments):
    """The names of the parameters of which nothing is known."""
    each = by_name(moments, moments.deviation)
    return {name for name, deviation in each.items() if deviation < 0}


# --- the modules ----------------------------------------------------------------------

PAIRS = {
    "Linear": (Linear, nnx.Linear, (3, 4), {}),
    "Linear, bfloat16": (Linear, nnx.Linear, (3, 4), {"dtype": jnp.bfloat16}),
    "Linear, no bias": (Linear, nnx.Linear, (3, 4), {"use_bias": False}),
    "LayerNorm": (LayerNorm, nnx.LayerNorm, (3,), {}),
    "LayerNorm, no scale": (LayerNorm, nnx.LayerNorm, (3,), {"use_scale": False}),
    "RMSNorm": (RMSNorm, nnx.RMSNorm, (3,), {"dtype": jnp.bfloat16}),
    "Embed": (Embed, nnx.Embed, (3, 4), {}),
    "Embed, one word": (Embed, nnx.Embed, (1, 4), {}),
}


def of_module(module, x):
    y = module(x)
    if isinstance(module, nnx.Embed):
        y = jnp.concatenate([y, module.attend(y)], axis=-1)
    return jnp.mean(y.astype(jnp.float32) ** 2)


def input_of(module):
    if isinstance(module, nnx.Embed):
        return jnp.arange(BATCH * 2).reshape(BATCH, 2) % module.num_embeddings
    return jax.random.normal(jax.random.key(0), (BATCH, 2, 3))


@pytest.mark.parametrize("name", PAIRS)
@quick_only("Linear")
def test_without_taps_a_module_is_that_of_nnx(name):
    ours, theirs, shape, options = PAIRS[name]
    ours = ours(*shape, rngs=nnx.Rngs(0), **options)
    theirs = theirs(*shape, rngs=nnx.Rngs(0), **options)
    chex.assert_trees_all_equal(*map(nnx.to_pure_dict, map(nnx.state, (ours, theirs))))
    found = nnx.value_and_grad(of_module)(ours, input_of(ours))
    expected = nnx.value_and_grad(of_module)(theirs, input_of(theirs))
    chex.assert_trees_all_equal(nnx.as_pure(found), nnx.as_pure(expected))


@pytest.mark.parametrize("name", PAIRS)
@quick_only("RMSNorm")
def test_with_taps_it_is_that_of_nnx_to_rounding(name):
    ours, theirs, shape, options = PAIRS[name]
    ours = ours(*shape, rngs=nnx.Rngs(0), **options)
    theirs = theirs(*shape, rngs=nnx.Rngs(0), **options)
    x, rtol = input_of(ours), 2**-7 if "dtype" in options else RTOL
    *found, moments = by_taps(ours, x, of_module)
    *expected, expected_moments = one_by_one(theirs, x, of_module)
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=rtol * 0.1)
    assert_moments_close(moments, expected_moments, rtol)


def test_the_model_is_left_as_it_was():
    model = Pair()
    before, state = nnx.split(model)
    by_taps(model, ROWS, in_a_loop)
    assert nnx.split(model)[0] == before
    assert not jax.tree.leaves(nnx.state(model, NormTap))
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), nnx.as_pure(state))


# --- a transformer --------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tied"), [(Block, True), (Layer, False)])
@full
def test_moments_are_those_of_one_example_per_microbatch(kind, tied):
    model = Transformer(kind, tied=tied)
    *found, moments = by_taps(model)
    *expected, expected_moments = one_by_one(model)
    assert_moments_close(moments, expected_moments)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


@full
def test_graph_and_tree_mode_of_nnx_agree():
    flax.config.update("nnx_graph_mode", False)
    try:
        moments = by_taps(Transformer())[2]
    finally:
        flax.config.update("nnx_graph_mode", True)
    assert_moments_close(moments, usual())


def nnx_scan(blocks, x):
    return nnx.scan(
        lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )(x, blocks)


def nnx_scan_of_params(blocks, x):
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    scan = nnx.scan(
        lambda x, block: block(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry
    )
    return scan(x, blocks)


def lax_scan_of_checkpoints(blocks, x):
    graph, state = nnx.split(blocks)

    @jax.checkpoint
    def body(x, state):
        return nnx.merge(graph, state)(x), None

    return jax.lax.scan(body, x, state)[0]


def stacked(run):
    """A model whose layers are one module."""
    model = Transformer(layers=2, run=run)
    graph = nnx.graphdef(model.blocks[0])
    state = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *map(nnx.state, model.blocks)
    )
    model.blocks = nnx.merge(graph, state)
    return model


@cache
def two_layers():
    """Moments of two layers that are not stacked, by taps."""
    return by_taps(Transformer(layers=2))[2]


def join_layers(moments):
    """Deviations by name, of layers that are not stacked as if they were."""
    joined = {}
    for name, deviation in by_name(moments, moments.deviation).items():
        path = name.split("/")
        path = "/".join(part for part in path if not part.isdigit())
        joined[path] = joined.get(path, 0) + deviation
    return joined


@pytest.mark.parametrize("run", [nnx_scan, nnx_scan_of_params, lax_scan_of_checkpoints])
@full
def test_layers_may_be_stacked_and_scanned(run):
    moments = by_taps(stacked(run))[2]
    found, expected = join_layers(moments), join_layers(two_layers())
    chex.assert_trees_all_close(found, expected, rtol=1e-3)


def remat(blocks, x):
    for block in blocks:
        x = nnx.remat(lambda block, x: block(x))(block, x)
    return x


def checkpoint(blocks, x):
    for block in blocks:
        x = jax.checkpoint(lambda x, block=block: block(x))(x)
    return x


@pytest.mark.parametrize("run", [remat, checkpoint])
@full
def test_layers_may_be_computed_twice(run):
    assert_moments_close(by_taps(Transformer(run=run))[2], usual())


@full
def test_norms_in_bfloat16_are_those_in_float32_to_its_rounding():
    found = by_taps(Transformer(dtype=jnp.bfloat16))[2]
    assert found.deviation.dtype == jnp.float32
    # Entries are rounded to 2⁻⁹, a few times over on the way through a block.
    assert_moments_close(found, usual(), rtol=2**-5)


@full
def test_examples_may_have_weights():
    # As many tokens as there are before the padding, in one none.
    mask = jnp.arange(5) < jnp.array([5, 2, 0, 4])[:, None]

    def masked_loss(model, batch):
        x, mask = batch
        losses = jnp.mean(both(model, x) ** 2, axis=-1)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    count = {"loss_fn": masked_loss, "weight_fn": lambda batch: batch[1].sum(1)}
    value, _, moments = by_taps(Pair(), (ROWS, mask), **count)
    count["weight_fn"] = lambda batch: batch[1].sum()
    expected, _, expected_moments = one_by_one(Pair(), (ROWS, mask), **count)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    assert_moments_close(moments, expected_moments)
    assert (int(moments.num_microbatches), float(moments.weight)) == (3, 11)


@full
def test_only_some_types_can_be_tapped():
    moments = by_taps(Transformer(), only=(LayerNorm, RMSNorm))[2]
    found, expected = (by_name(m, m.deviation) for m in (moments, usual()))
    norms = {name for name in found if "norm" in name}
    assert len(norms) == 3
    assert unknown(moments) == found.keys() - norms
    for name in norms:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3)


def test_by_what_it_differentiates_can_be_chosen():
    chosen = {"wrt": nnx.PathContains("bias"), "loss_fn": pair_loss}
    moments = by_taps(Pair(), ROWS, **chosen)[2]
    assert_moments_close(moments, one_by_one(Pair(), ROWS, **chosen)[2])
    assert ost.leaf_names(moments.leaves) == ["first/bias", "second/bias"]


def test_a_plain_module_among_them_is_not_known():
    model = Pair()
    model.second = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    moments = by_taps(model, ROWS, pair_loss)[2]
    assert unknown(moments) == {"second/bias", "second/kernel"}


@full
def test_what_a_subclass_adds_is_not_known():
    class Gated(Linear):
        def __init__(self, *features, rngs):
            super().__init__(*features, rngs=rngs)
            self.gate = nnx.Param(jnp.ones(()))

        def __call__(self, inputs, out_sharding=None):
            return super().__call__(inputs, out_sharding) * self.gate[...]

    model = Pair()
    model.second = Gated(3, 3, rngs=nnx.Rngs(0))
    moments = by_taps(model, ROWS, pair_loss)[2]
    assert unknown(moments) == {"second/gate"}
    found = by_name(moments, moments.deviation)
    expected = one_by_one(model, ROWS, pair_loss)[2]
    expected = by_name(expected, expected.deviation)
    np.testing.assert_allclose(
        found["second/kernel"], expected["second/kernel"], rtol=1e-3
    )


def test_equal_examples_do_not_go_below_zero():
    rows = jnp.broadcast_to(ROWS[0], ROWS.shape)
    moments = by_taps(Pair(), rows, pair_loss)[2]
    assert float(jnp.min(moments.deviation)) >= 0
    size = moments.weight * jnp.square(moments.norm)
    assert float(jnp.max(moments.deviation / size)) < RTOL


def test_an_example_that_is_not_finite_makes_nothing_known():
    def loss(model, batch):
        windows, scales = batch
        x = model.tokens(windows) * scales[:, None, None]
        return jnp.mean(model.tokens.attend(x) ** 2)

    scales = jnp.ones(BATCH).at[1].set(jnp.nan)
    moments = by_taps(Transformer(), (WINDOWS, scales), loss)[2]
    assert unknown(moments) >= {"tokens/embedding"}


# --- what the loss does beside --------------------------------------------------------


class Dropped(nnx.Module):
    """Draws random numbers and counts its calls."""

    def __init__(self):
        self.linear = Linear(3, 4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.linear(x))


def test_what_the_loss_writes_is_in_the_model():
    model = Dropped()
    by_taps(model, ROWS, lambda model, x: jnp.mean(model(x)))
    assert int(model.calls[...]) == 1


@full
def test_it_writes_and_draws_as_value_and_grad_does():
    def loss(model, x):
        y = model(x)
        return jnp.mean(y**2), y == 0

    x = jax.random.normal(jax.random.key(0), (BATCH, 3))
    ours, theirs = Dropped(), Dropped()
    plain = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
    for _ in range(2):
        *found, _ = by_taps(ours, x, loss, has_aux=True)
        chex.assert_trees_all_close(tuple(found), plain(theirs, x), rtol=RTOL)
    chex.assert_trees_all_equal(*map(nnx.as_pure, map(nnx.state, (ours, theirs))))
    assert int(ours.calls[...]) == 2


@full
def test_moments_go_through_an_optimizer_that_donates():
    model = Pair()
    tx = ost.accumulate_moments(ost.safe_adamw(1e-2), every_k=2, mean_square=False)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, x):
        loss, grads, moments = per_example_gradients(pair_loss)(model, x)
        optimizer.update(model, grads, value=loss, moments=moments)
        return loss

    losses = [float(step(model, optimizer, ROWS)) for _ in range(4)]
    assert losses[-1] < losses[0]


@full
def test_a_batch_may_be_sharded():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    windows = jax.random.randint(jax.random.key(2), (8, LENGTH + 1), 0, WORDS)
    expected = by_taps(Transformer(), windows)[2]
    windows = jax.device_put(windows, NamedSharding(mesh, PartitionSpec("data")))
    model = Transformer()
    graph, state = nnx.split(model)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    assert_moments_close(by_taps(nnx.merge(graph, state), windows)[2], expected)


# --- a second use ---------------------------------------------------------------------


FIRST = {"first/bias", "first/kernel"}


def in_a_loop(model, x):
    graph, state = nnx.split(model.first)

    def body(x, _):
        return nnx.merge(graph, state)(x), None

    return jnp.mean(model.second(jax.lax.scan(body, x, None, length=2)[0]) ** 2)


def in_two_checkpoints(model, x):
    for _ in range(2):
        x = jax.checkpoint(lambda x: model.first(x))(x)
    return jnp.mean(model.second(x) ** 2)


def in_two_checkpoints_that_cancel(model, x):
    """The gradients of both uses are orthogonal, those of the examples are not."""
    x, loss = jnp.ones_like(x), 0.0
    for signs in ([2, 0, 2, 0], [1, -1, 1, -1]):
        y = jax.checkpoint(lambda x: model.first(x))(x)
        loss += jnp.mean(jnp.array(signs)[:, None, None] * y)
    return loss


def in_a_penalty(model, x):
    penalty = jnp.sum(model.first.kernel[...] ** 2) + jnp.sum(model.first.bias[...] + 1)
    return jnp.mean(model.second(model.first(x)) ** 2) + 0.1 * penalty


def past_its_module(model, x):
    x = model.first(x)
    x = x @ model.first.kernel[...] + model.first.bias[...]
    return jnp.mean(model.second(x) ** 2)


@pytest.mark.parametrize(
    "loss",
    [
        in_a_loop,
        in_two_checkpoints,
        in_two_checkpoints_that_cancel,
        in_a_penalty,
        past_its_module,
    ],
)
@quick_only("in_a_loop", "past_its_module")
def test_what_the_taps_have_not_seen_is_not_known(loss):
    moments = by_taps(Pair(), ROWS, loss)[2]
    assert unknown(moments) == FIRST


def test_one_module_called_twice_is_an_error_that_says_so():
    def loss(model, x):
        return jnp.mean(model.first(model.first(x)) ** 2)

    with pytest.raises(ValueError, match=r"'first/kernel' is used twice.*nnx's own"):
        by_taps(Pair(), ROWS, loss)


@full
def test_a_module_may_be_called_in_either_of_two_branches():
    def loss(model, x):
        x = jax.lax.cond(
            model.first.bias[0] < 1, lambda: model.first(x), lambda: 2 * model.first(x)
        )
        return jnp.mean(model.second(x) ** 2)

    assert_moments_close(
        by_taps(Pair(), ROWS, loss)[2], one_by_one(Pair(), ROWS, loss)[2]
    )


def words(name):
    """Losses that use an embedding more often than as input and output."""

    def loss(model, ids):
        tokens = model.tokens
        if name == "two lookups":
            return jnp.mean((tokens(ids) * tokens(ids)) ** 2)
        if name == "two heads":
            x = tokens.attend(tokens(ids))
            return jnp.mean(tokens.attend(x[..., :WIDTH]) ** 2)
        x = jax.checkpoint(lambda ids: tokens(ids))(ids)
        return jnp.mean(tokens.attend(x) ** 2)

    return loss


@pytest.mark.parametrize("name", ["two lookups", "two heads"])
def test_an_embedding_has_one_lookup_and_one_head(name):
    model = nnx.Dict(tokens=Embed(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'tokens/embedding' is used twice"):
        by_taps(model, WINDOWS, words(name))


def test_a_head_out_of_reach_of_its_lookup_is_not_known():
    moments = by_taps(Transformer(), WINDOWS, words("a lookup in a checkpoint"))[2]
    assert "tokens/embedding" in unknown(moments)


# --- errors ---------------------------------------------------------------------------


def test_a_model_of_plain_modules_is_an_error_that_names_the_others():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Linear, Embed, LayerNorm and RMSNorm of"):
        by_taps(model, ROWS, of_module)
    with pytest.raises(ValueError, match=r"only=.'RMSNorm'"):
        by_taps(Pair(), ROWS, in_a_loop, only=(RMSNorm,))


def call(*arguments, **options):
    return lambda model, x: jnp.mean(model(x, *arguments, **options))


UNSUPPORTED = {
    "out_sharding": (
        Linear(3, 3, rngs=nnx.Rngs(0)),
        call(out_sharding=PartitionSpec()),
    ),
    "dot_general": (
        Linear(3, 3, dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0)),
        call(),
    ),
    "mask": (LayerNorm(3, rngs=nnx.Rngs(0)), call(mask=ROWS > 0)),
    "axis_name": (RMSNorm(3, axis_name="data", rngs=nnx.Rngs(0)), call()),
    "reduction_axes": (LayerNorm(3, reduction_axes=(1, 2), rngs=nnx.Rngs(0)), call()),
    "feature_axes": (RMSNorm(5, feature_axes=1, rngs=nnx.Rngs(0)), call()),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_an_error_that_names_it(name):
    model, loss = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=f"{type(model).__name__}: .* with {name}"):
        by_taps(model, ROWS, loss)


def test_an_input_without_axis_of_examples_is_an_error():
    def loss(model, ids):
        return jnp.mean(model(jnp.arange(3)) + ids[:, None, None])

    model = Embed(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"'embedding' is used on .*shape \(3,\).* 4 ex"
    ):
        by_taps(model, jnp.arange(BATCH), loss)


def test_layers_that_are_stacked_elsewhere_are_an_error():
    def loss(model, x):
        return jnp.mean(model(x))

    model = Linear(3, 3, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="'kernel' is stacked"):
        by_taps(model, ROWS, loss)


def test_weights_are_one_for_each_example():
    with pytest.raises(ValueError, match=r"shape \(2,\).* the 4 examples"):
        by_taps(Transformer(), weight_fn=lambda batch: jnp.ones(2))


def test_a_new_variable_is_an_error_that_says_so():
    def loss(model, x):
        model.seen = nnx.Variable(x)
        return in_a_penalty(model, x)

    with pytest.raises(ValueError, match="loss_fn added variables"):
        by_taps(Pair(), ROWS, loss)


def test_complex_parameters_are_refused_by_name():
    model = Linear(2, 2, use_bias=False, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    fn = per_example_gradients(lambda model, x: jnp.sum(jnp.abs(model(x))))
    with pytest.raises(TypeError, match=r"kernel is complex64.*microbatch_gradients"):
        fn(model, jnp.ones((3, 2)))
