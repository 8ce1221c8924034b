"""Linen's train state told more than gradients, and NNX modules in microbatches."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops
from flax.training import train_state
from tiers import full, quick_only

import optax_stability as ost
from optax_stability._core import _tree
from optax_stability.flax import TrainState, _microbatching, microbatch_gradients

MODEL = nn.Dense(2)
X = jnp.ones((4, 3))


def create(tx, kind=TrainState):
    params = MODEL.init(jax.random.key(0), X)["params"]
    return kind.create(apply_fn=MODEL.apply, params=params, tx=tx)


def loss_and_grads(state):
    def loss_fn(params):
        return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

    return jax.value_and_grad(loss_fn)(state.params)


@full
def test_the_loss_reaches_the_chain():
    @jax.jit
    def step(state):
        loss, grads = loss_and_grads(state)
        return state.apply_gradients(grads=grads, extra_args={"value": loss}), loss

    state = create(ost.spike_guard(ost.safe_adamw(0.1)))
    for _ in range(3):
        state, loss = step(state)
    assert int(state.step) == 3
    assert float(ost.metrics(state)["skip/value"]) == float(loss)


@full
def test_without_extra_arguments_it_is_flax_s_own():
    tx = optax.adamw(0.1)
    ours, flaxs = create(tx), create(tx, train_state.TrainState)
    for _ in range(2):
        ours = ours.apply_gradients(grads=loss_and_grads(ours)[1])
        flaxs = flaxs.apply_gradients(grads=loss_and_grads(flaxs)[1])
    chex.assert_trees_all_equal(ours.params, flaxs.params)
    chex.assert_trees_all_equal(ours.opt_state, flaxs.opt_state)
    assert ours.tx is tx


def test_an_optimizer_that_takes_none_ignores_them():
    state = create(optax.GradientTransformation(*optax.sgd(0.1)))
    _, grads = loss_and_grads(state)
    told = state.apply_gradients(grads=grads, extra_args={"value": 1.0})
    chex.assert_trees_all_equal(told.params, state.apply_gradients(grads=grads).params)


def test_extra_arguments_are_those_of_one_step():
    state = create(optax.sgd(0.1))
    told = state.apply_gradients(grads=state.params, extra_args={"value": 1.0})
    assert told.tx is state.tx


def test_further_fields_are_replaced_and_subclasses_kept():
    class WithKey(TrainState):
        key: jax.Array

    params = MODEL.init(jax.random.key(0), X)["params"]
    state = WithKey.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1), key=jnp.zeros(2)
    )
    state = state.apply_gradients(grads=params, key=jnp.ones(2))
    assert isinstance(state, WithKey)
    np.testing.assert_array_equal(state.key, 1.0)


def test_leaves_that_are_overwritten_with_their_gradient_still_are():
    name = fp8_ops.OVERWRITE_WITH_GRADIENT
    params = {"params": {"w": jnp.ones(2)}, name: {"scale": jnp.ones(1)}}
    state = TrainState.create(
        apply_fn=None, params=params, tx=ost.spike_guard(optax.sgd(0.1))
    )
    grads = {"params": {"w": jnp.ones(2)}, name: {"scale": jnp.full(1, 7.0)}}
    state = state.apply_gradients(grads=grads, extra_args={"value": 1.0})
    np.testing.assert_array_equal(state.params[name]["scale"], 7.0)
    np.testing.assert_allclose(state.params["params"]["w"], 0.9, rtol=1e-6)


def test_a_missing_loss_names_the_remedy():
    state = create(ost.spike_guard(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"extra_args=\{'value': loss\}"):
        state.apply_gradients(grads=state.params)


# --- NNX modules in microbatches ---------------------------------------------------


class Net(nnx.Module):
    """Everything that a module can carry beside its parameters."""

    def __init__(self, *, norm=False, rate=0.0):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.frozen = nnx.Cache(jnp.ones((64, 64)))
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.inner(x)
        return self.dropout(x if self.norm is None else self.norm(x))


def squares(model, x):
    return jnp.mean(model(x) ** 2)


ROWS = jax.random.normal(jax.random.key(1), (12, 3))


@pytest.mark.parametrize("vmap_size", [1, 2, 4])
@quick_only("2")
def test_an_nnx_module_has_the_gradient_of_the_whole_batch(vmap_size):
    expected = nnx.value_and_grad(squares)(Net(), ROWS)
    split = nnx.jit(microbatch_gradients(squares, 4, vmap_size=vmap_size))
    *found, moments = split(Net(), ROWS)
    chex.assert_trees_all_close(tuple(found), expected, rtol=1e-5)
    assert int(moments.num_microbatches) == 4
    assert float(moments.weight) == len(ROWS)


@full
def test_graph_and_tree_mode_of_nnx_agree():
    expected = microbatch_gradients(squares, 4)(Net(), ROWS)
    flax.config.update("nnx_graph_mode", False)
    try:
        found = microbatch_gradients(squares, 4)(Net(), ROWS)
    finally:
        flax.config.update("nnx_graph_mode", True)
    chex.assert_trees_all_close(nnx.as_pure(found), nnx.as_pure(expected), rtol=1e-6)


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("1")
def test_running_statistics_are_the_mean_over_microbatches(vmap_size):
    model = Net(norm=True)
    microbatch_gradients(squares, 4, vmap_size=vmap_size)(model, ROWS)
    outputs = np.asarray(Net().inner(ROWS)).reshape(3, 4, 4)  # [row, microbatch, unit]
    means = outputs.mean(axis=(0, 1))
    variances = outputs.var(axis=0).mean(axis=0)
    np.testing.assert_allclose(model.norm.mean[...], 0.1 * means, atol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], 0.9 + 0.1 * variances, atol=1e-6)
    assert int(model.calls[...]) == 1


def test_merged_values_are_the_mean_of_those_that_are_finite():
    values = jnp.array([[1.0, jnp.nan, 5.0], [jnp.nan, jnp.inf, 6.0], [3.0, 2.0, 7.0]])
    merged = _microbatching._merge_versions(values)
    np.testing.assert_array_equal(merged, [2.0, 2.0, 6.0])
    merged = _microbatching._merge_versions(values[:2])
    np.testing.assert_array_equal(merged, [1.0, jnp.nan, 5.5])


@full
def test_a_bad_microbatch_does_not_reach_the_running_statistics():
    model, clean = Net(norm=True), Net(norm=True)
    rows = ROWS.at[0].set(jnp.nan)
    _, grads, moments = microbatch_gradients(squares, 4)(model, rows)
    kept = ROWS.reshape(3, 4, 3)[:, 1:].reshape(9, 3)
    _, expected, _ = microbatch_gradients(squares, 3)(clean, kept)
    assert int(moments.num_microbatches) == 3
    chex.assert_trees_all_close(grads, expected, rtol=1e-5)
    chex.assert_trees_all_close(
        nnx.state(model, nnx.BatchStat), nnx.state(clean, nnx.BatchStat), rtol=1e-5
    )


def test_every_microbatch_has_its_own_keys_and_every_call():
    streams = _tree.pure(nnx.state(nnx.Rngs(0)))
    forks, advanced = _microbatching._fork_streams(streams, 3)
    later, _ = _microbatching._fork_streams(nnx.merge_state(streams, advanced), 3)
    keys = [jax.random.key_data(each["default"]["key"]) for each in (forks, later)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 6


@full
def test_every_microbatch_has_its_own_dropout_and_every_call():
    model = Net(rate=0.5)

    def loss_fn(model, x):
        dropped = model(x) == 0
        return jnp.mean(model.inner(x) ** 2), dropped

    fn = microbatch_gradients(loss_fn, 4, has_aux=True)
    masks = [fn(model, ROWS)[0][1] for _ in range(2)]
    assert len({np.asarray(mask).tobytes() for mask in [*masks[0], *masks[1]]}) == 8


def test_what_nobody_writes_is_not_copied():
    model = Net()
    graphdef, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graphdef, state)
        microbatch_gradients(squares, 4, vmap_size=1)(model, ROWS)
        return nnx.state(model)

    compiled = jax.jit(run, donate_argnums=0).lower(state).compile()
    frozen = model.frozen[...].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < frozen


@full
def test_by_what_it_differentiates_can_be_chosen():
    fn = microbatch_gradients(squares, 2, wrt=nnx.PathContains("bias"))
    _, grads, _ = fn(Net(), ROWS)
    assert ost.leaf_names(grads) == ["inner/bias"]


@full
def test_microbatches_go_through_an_nnx_optimizer():
    model = Net()
    inner = ost.safe_adamw(1e-2, second_moment="microbatch")
    tx = ost.accumulate_moments(ost.spike_guard(inner), every_k=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rows):
        fn = microbatch_gradients(squares, 3, mean_square=True)
        loss, grads, moments = fn(model, rows)
        optimizer.update(model, grads, value=loss, moments=moments)

    for _ in range(4):
        step(model, optimizer, ROWS)
    (adam,) = optax.tree.get_all_with_path(
        nnx.as_pure(optimizer.opt_state), "microbatches"
    )
    assert int(adam[1]) == 12


def test_a_new_variable_is_an_error_that_says_so():
    def loss_fn(model, x):
        model.inner.seen = nnx.Variable(x)
        return squares(model, x)

    with pytest.raises(ValueError, match="loss_fn added variables"):
        microbatch_gradients(loss_fn, 2)(Net(), ROWS)


def test_a_batch_that_cannot_be_split_is_named_as_it_was_given():
    with pytest.raises(ValueError, match="'x', of shape \\(12, 3\\)"):
        microbatch_gradients(lambda m, b: squares(m, b["x"]), 5)(Net(), {"x": ROWS})


@full
def test_weights_see_the_batch_as_it_was_given():
    fn = microbatch_gradients(squares, 2, weight_fn=lambda x: 10 * x.shape[0])
    assert float(fn(Net(), ROWS)[2].weight) == 120
