"""Half precision with a loss scale: overflow is skipped, underflow is seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import optax_stability as ost
from optax_stability.flax import TrainState

X = jax.random.normal(jax.random.key(0), (8, 4))
Y = X @ jnp.arange(8.0).reshape(4, 2) / 8


def create(tx):
    model = nn.Dense(2, dtype=jnp.float16)
    params = model.init(jax.random.key(1), X)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def step(state, scaler):
    """One step; gradients reach the chain as they come, without a look at is_finite."""

    def loss_fn(params):
        error = state.apply_fn({"params": params}, X) - Y.astype(jnp.float16)
        return jnp.mean(jnp.square(error)).astype(jnp.float32)

    scaler, _, loss, grads = scaler.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, extra_args={"value": loss}), scaler, loss


def test_an_overflow_of_the_loss_scale_is_skipped_and_counted():
    tx = ost.spike_guard(optax.chain(ost.clip_by_zscore(), ost.safe_adamw(0.05)))
    state, scaler = create(tx), DynamicScale(scale=jnp.float32(2.0**24))
    losses = []
    for _ in range(60):
        state, scaler, loss = step(state, scaler)
        losses.append(float(loss))
    overflows = 24 - int(np.log2(scaler.scale))
    assert overflows > 3
    metrics = ost.metrics(state)
    assert int(metrics["skip/nonfinite_total"]) == overflows
    assert int(metrics["skip/total"]) == overflows
    assert int(metrics["clip/nonfinite_total"]) == 0  # They never came that far.
    assert losses[overflows] == losses[0]  # Nothing moved until the scale fitted.
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("scale", "lost"), [(1.0, False), (2.0**-22, True)])
def test_gradients_that_underflow_before_the_optimizer_are_counted(scale, lost):
    state = create(ost.safe_adamw(0.05))
    scaler = DynamicScale(growth_interval=1000, scale=jnp.float32(scale))
    for _ in range(3):
        state, scaler, _ = step(state, scaler)
    assert (float(ost.metrics(state)["adam/zero_fraction"]) > 0.5) == lost
