"""A NaN in a leaf that is not trained: named, and kept out of the guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

PARAMS = {"a": jnp.ones(2), "frozen": jnp.ones(2)}
LABELS = {"a": "train", "frozen": "stop"}
GRADS = {"a": jnp.ones(2), "frozen": jnp.array([1.0, jnp.nan])}
FROZEN = optax.partition({"train": optax.sgd(0.1), "stop": optax.set_to_zero()}, LABELS)
STEPS = 30


def run(tx, grads=GRADS, steps=STEPS):
    state, params = tx.init(PARAMS), PARAMS
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    for _ in range(steps):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


GUARDS = {
    "spike_guard": ost.spike_guard,
    "skip_spikes": ost.skip_spikes,
    "branch_on_spike": ost.branch_on_spike,
}


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS.keys())
def test_the_leaf_is_named_though_every_step_is_skipped(guard):
    _, state = run(guard(FROZEN))
    found = ost.metrics(state, params=PARAMS)
    assert found["skip/total"] == STEPS
    assert found["skip/nonfinite/frozen"] == STEPS
    assert found["skip/nonfinite/a"] == 0


def test_the_diagnosis_names_the_leaf_and_the_remedy():
    _, state = run(ost.record_history(ost.spike_guard(FROZEN), length=16))
    (found,) = [f for f in ost.diagnose(ost.history(state)) if f.kind == "nonfinite"]
    assert found.layer == "frozen"
    assert "optax.partition" in " ".join(found.remedies)


def test_a_nan_now_and_then_is_not_called_a_frozen_leaf():
    tx = ost.record_history(ost.spike_guard(optax.sgd(0.1)))
    state = tx.init(PARAMS)
    for step in range(16):
        grads = GRADS if step == 9 else PARAMS
        _, state = tx.update(grads, state, PARAMS, value=1.0)
    (found,) = [f for f in ost.diagnose(ost.history(state)) if f.kind == "nonfinite"]
    assert found.layer == "frozen"
    assert "optax.partition" not in " ".join(found.remedies)


def test_a_guard_inside_a_partition_does_not_see_the_leaf():
    tx = optax.partition(
        {"train": ost.spike_guard(optax.sgd(0.1)), "stop": optax.set_to_zero()}, LABELS
    )
    params, state = run(tx)
    np.testing.assert_allclose(params["a"], 1 - 0.1 * STEPS, rtol=1e-5)
    np.testing.assert_array_equal(params["frozen"], PARAMS["frozen"])
    assert ost.metrics(state)["skip/total"] == 0


def test_a_guard_inside_a_mask_does_not_see_the_leaf():
    trained = {"a": True, "frozen": False}
    tx = optax.masked(ost.spike_guard(optax.sgd(0.1)), trained)
    zeros = {"a": jnp.ones(2), "frozen": jnp.zeros(2)}
    params, _ = run(tx, zeros)
    np.testing.assert_allclose(params["a"], 1 - 0.1 * STEPS, rtol=1e-5)


def test_a_leaf_without_a_gradient_may_be_there_at_init():
    _, state = run_without_frozen(jnp.array([jnp.inf, 1.0]))
    assert ost.metrics(state)["skip/nonfinite/per_leaf"].tolist() == [1, 0]
    updates, _ = run_without_frozen(jnp.ones(2))
    assert updates["frozen"] is None


def run_without_frozen(grad):
    tx = ost.skip_spikes(optax.sgd(0.1))
    return tx.update({"a": grad, "frozen": None}, tx.init(PARAMS), PARAMS)
