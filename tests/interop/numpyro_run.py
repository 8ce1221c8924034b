"""A guarded run of NumPyro: the lines of docs/trainers/numpyro.md."""

# [imports]
import jax
import optax
import orbax.checkpoint as ocp
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import optax_stability as ost


# [before]
def make_svi_before(model):
    return SVI(model, AutoNormal(model), optax.adamw(1e-2), Trace_ELBO())


# [guard]
def make_svi(model, learning_rate=1e-2):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    tx = ost.record_history(ost.spike_guard(chain), length=1024)
    return SVI(model, AutoNormal(model), tx, Trace_ELBO())


# [metrics]
def train(svi, state, batches, log):
    update = jax.jit(svi.update)
    for batch in batches:
        state, loss = update(state, *batch)
        log({"loss": loss} | ost.metrics(state.optim_state))
    return state


# [rate]
def make_svi_with_its_rate(model, schedule):
    def guarded(learning_rate):
        return ost.spike_guard(ost.safe_adamw(learning_rate))

    tx = optax.inject_hyperparams(guarded)(learning_rate=schedule)
    return SVI(model, AutoNormal(model), tx, Trace_ELBO())


def rate_of(state):
    _, (_, opt_state) = state.optim_state
    return opt_state.hyperparams["learning_rate"]


# [restart]
def save(path, state):
    state = state._replace(rng_key=jax.random.key_data(state.rng_key))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def restore(path, like):
    like = like._replace(rng_key=jax.random.key_data(like.rng_key))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path, like)
    return state._replace(rng_key=jax.random.wrap_key_data(state.rng_key))


# [end]
