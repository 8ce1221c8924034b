"""A guarded run with Equinox: the lines of docs/trainers/equinox.md."""

# [imports]
import equinox as eqx
import optax

import optax_stability as ost


# [before]
def make_step_before(loss_fn, tx):
    @eqx.filter_jit
    def step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    return step


# [guard]
def make_tx(learning_rate):
    chain = optax.chain(ost.clip_by_zscore(), ost.safe_adamw(learning_rate))
    return ost.record_history(ost.spike_guard(chain), length=1024)


def make_step(loss_fn, tx):
    @eqx.filter_jit
    def step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, value=loss)
        return eqx.apply_updates(model, updates), state, loss

    return step


# [microbatches]
def make_step_of_microbatches(loss_fn, tx, num_microbatches):
    value_and_grad = ost.microbatch_gradients(loss_fn, num_microbatches)

    @eqx.filter_jit
    def step(model, state, batch):
        loss, grads, moments = value_and_grad(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, value=loss, moments=moments)
        return eqx.apply_updates(model, updates), state, loss

    return step


# [train]
def train(step, tx, model, batches, log, state=None):
    if state is None:
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for batch in batches:
        model, state, loss = step(model, state, batch)
        log({"loss": loss} | ost.metrics(state))
    return model, state


# [restart]
def save(path, model, state):
    eqx.tree_serialise_leaves(path, (model, state))


def restore(path, like_model, tx):
    like = like_model, tx.init(eqx.filter(like_model, eqx.is_inexact_array))
    return eqx.tree_deserialise_leaves(path, like)


# [rate]
def make_tx_with_its_rate(schedule):
    return optax.inject_hyperparams(make_tx)(learning_rate=schedule)


def rate_of(state):
    return state.hyperparams["learning_rate"]


# [end]
