"""A guard without a loss scales large norms by design: that is no finding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

PARAMS = {"w": jnp.zeros(())}
STEPS = 400


def kinds(spikes):
    """What is found in a run whose norm is ten times as large at these steps."""
    guard = ost.spike_guard(optax.sgd(1e-3), loss=False)
    tx = ost.record_history(guard, length=STEPS)
    rng = np.random.default_rng(0)
    norms = np.exp(0.1 * rng.standard_normal(STEPS)).astype(np.float32)
    norms[spikes] *= 10

    def step(state, norm):
        return tx.update({"w": norm}, state, PARAMS)[1], None

    state, _ = jax.lax.scan(step, tx.init(PARAMS), norms)
    history = ost.history(state)
    assert history["skip/declined_total"][-1] == len(spikes)
    return [found.kind for found in ost.diagnose(history)]


@pytest.mark.parametrize("spikes", [[100], [100, 200, 350]])
def test_a_large_norm_now_and_then_is_no_finding(spikes):
    assert "skip_budget_spent" not in kinds(spikes)


def test_large_norms_again_and_again_are_one():
    assert "skip_budget_spent" in kinds(list(range(100, 400, 30)))
