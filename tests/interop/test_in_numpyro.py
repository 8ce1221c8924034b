"""NumPyro: real steps of SVI with a NaN batch, a spike and a restart."""

import importlib.util

import jax
import numpy as np
import optax
import pytest

import optax_stability as ost

if importlib.util.find_spec("numpyro") is None:
    pytest.skip("needs numpyro", allow_module_level=True)

import numpyro_model as toy
import numpyro_run as run

NAN, SPIKE, STEPS = 6, 150, 160
BAD = {NAN: np.nan, SPIKE: 100.0}


def start(svi):
    (first,) = toy.batches(1)
    return svi.init(jax.random.key(0), *first)


def arrays(state):
    return jax.tree.leaves(state.optim_state)


@pytest.fixture(scope="module")
def guarded():
    svi, rows = run.make_svi(toy.regression), []
    return run.train(svi, start(svi), toy.batches(STEPS, BAD), rows.append), rows


def test_both_bad_batches_are_skipped_and_no_other(guarded):
    state, rows = guarded
    skipped = [bool(row["skip/skipped"]) for row in rows]
    assert np.flatnonzero(skipped).tolist() == [NAN, SPIKE]
    assert all(np.isfinite(leaf).all() for leaf in arrays(state)[:4])


def test_the_guard_is_told_the_loss(guarded):
    _, rows = guarded
    for row in rows:
        np.testing.assert_array_equal(row["skip/value"], row["loss"])


def test_a_restart_ends_with_the_same_bits(guarded, tmp_path):
    svi = run.make_svi(toy.regression)
    data = list(toy.batches(STEPS, BAD))
    half = run.train(svi, start(svi), data[: STEPS // 2], lambda row: None)
    run.save(tmp_path / "state", half)
    half = run.restore(tmp_path / "state", start(svi))
    state = run.train(svi, half, data[STEPS // 2 :], lambda row: None)
    for a, b in zip(arrays(guarded[0]), arrays(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_the_guard_the_nan_ends_the_run():
    svi = run.make_svi_before(toy.regression)
    state = run.train(svi, start(svi), toy.batches(NAN + 2, BAD), lambda row: None)
    assert not all(np.isfinite(leaf).all() for leaf in arrays(state))


def test_its_own_loop_works_as_well():
    svi, (batch,) = run.make_svi(toy.regression), toy.batches(1)
    result = svi.run(jax.random.key(0), 5, *batch, progress_bar=False)
    assert ost.metrics(result.state.optim_state)["skip/total"] == 0


def test_the_learning_rate_can_be_read():
    schedule = optax.schedules.linear_schedule(1e-2, 0.0, 10)
    svi = run.make_svi_with_its_rate(toy.regression, schedule)
    state = run.train(svi, start(svi), toy.batches(5), lambda row: None)
    assert run.rate_of(state) == pytest.approx(0.6e-2)
