"""Guarded loops of Flax: the lines of docs/trainers/flax.md."""

# [imports]
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

import optax_stability as ost
from optax_stability.flax import TrainState


# [guard]
def make_tx(learning_rate):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    return ost.record_history(ost.spike_guard(chain), length=1024)


# [nnx-before]
@nnx.jit(static_argnums=3)
def step_before(model, optimizer, batch, loss_fn):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


# [nnx]
@nnx.jit(static_argnums=3)
def step(model, optimizer, batch, loss_fn):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, value=loss)
    return loss


# [nnx-train]
def train(model, optimizer, batches, loss_fn, log):
    for batch in batches:
        loss = step(model, optimizer, batch, loss_fn)
        log({"loss": loss} | ost.metrics(optimizer))


# [nnx-restart]
def save(path, model, optimizer):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(nnx.state((model, optimizer))))


def restore(path, model, optimizer):
    state = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update((model, optimizer), state)


# [linen]
def make_state(module, key, x, learning_rate=1e-2):
    params = module.init(key, x)["params"]
    return TrainState.create(
        apply_fn=module.apply, params=params, tx=make_tx(learning_rate)
    )


@jax.jit
def linen_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, extra_args={"value": loss}), loss


# [rate]
def make_tx_with_its_rate(schedule):
    return optax.inject_hyperparams(make_tx)(learning_rate=schedule)


def rate_of(optimizer):
    return optimizer.opt_state.hyperparams["learning_rate"][...]


# [end]
