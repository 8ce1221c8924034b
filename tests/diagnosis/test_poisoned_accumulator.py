"""A trainer that accumulates around the guard: one NaN freezes the run; it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

PARAMS = {"w": jnp.ones(4)}
WINDOWS, EVERY, BAD = 40, 2, 21


def train(guard, accumulate, **extra_args):
    """The state after a run in which one microbatch is NaN."""
    tx = accumulate(ost.record_history(guard(optax.adam(1e-2)), length=64))
    bad = (jnp.arange(WINDOWS * EVERY) == BAD)[:, None]

    def step(state, grads):
        return tx.update({"w": grads}, state, PARAMS, **extra_args)[1], None

    grads = jnp.where(bad, jnp.nan, jnp.ones(4))
    return jax.lax.scan(step, tx.init(PARAMS), grads)[0]


def multi_steps(tx):
    return optax.MultiSteps(tx, EVERY)


def accumulate_moments(tx):
    return ost.accumulate_moments(tx, EVERY)


GUARDS = {
    "with the loss": (ost.spike_guard, {"value": 1.0}),
    "without": (lambda tx: ost.spike_guard(tx, loss=False), {}),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_multi_steps_and_the_cure_are_named(guard):
    make, extra_args = GUARDS[guard]
    state = train(make, multi_steps, **extra_args)
    # Everything after the bad window is lost.
    assert ost.metrics(state)["skip/total"] == WINDOWS - BAD // EVERY
    (found,) = [x for x in ost.diagnose(ost.history(state)) if x.kind == "nonfinite"]
    assert "accumulator" in found.causes[0]
    assert "`accumulate_moments`" in found.remedies[0]
    assert "MultiSteps" in found.remedies[0]


@pytest.mark.parametrize("guard", GUARDS)
def test_the_cure_cures(guard):
    make, extra_args = GUARDS[guard]
    state = train(make, accumulate_moments, **extra_args)
    assert ost.metrics(state)["skip/total"] == 0
    assert ost.metrics(state)["accumulate/rejected_total"] == 1


def log(lost):
    """What a trainer logs: loss and norm of each microbatch, and our metrics."""
    rows = np.arange(60)
    bad = (rows >= 20) & lost | (rows == 20)
    return {
        "step": rows,
        "loss": 3 - 0.01 * rows,
        "grad/norm": np.where(rows == 20, np.nan, 1.0),
        "skip/norm": np.where(bad, np.nan, 1.0),
        "skip/skipped": bad.astype(float),
    }


def test_the_norm_before_the_accumulation_does_not_hide_it():
    (found,) = [x for x in ost.diagnose(log(lost=True)) if x.kind == "nonfinite"]
    assert "accumulator" in found.causes[0]
    assert "skip/norm is not finite in any of the 39 later steps" in found.evidence


def test_one_bad_step_is_no_lost_accumulator():
    (found,) = [x for x in ost.diagnose(log(lost=False)) if x.kind == "nonfinite"]
    assert "accumulator" not in found.causes[0]
    assert "finite again at step 21" in found.evidence
