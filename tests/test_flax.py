"""Linen's train state, with a word to the optimizer."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops
from flax.training import train_state

import optax_stability as ost
from optax_stability.flax import TrainState

MODEL = nn.Dense(2)
X = jnp.ones((4, 3))


def create(tx, kind=TrainState):
    params = MODEL.init(jax.random.key(0), X)["params"]
    return kind.create(apply_fn=MODEL.apply, params=params, tx=tx)


def loss_and_grads(state):
    def loss_fn(params):
        return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

    return jax.value_and_grad(loss_fn)(state.params)


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
