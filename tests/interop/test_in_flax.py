"""Flax: loops of NNX and Linen with a NaN batch, a spike and a restart."""

import importlib.util

import jax
import numpy as np
import pytest

import optax_stability as ost

if importlib.util.find_spec("flax") is None:
    pytest.skip("needs flax", allow_module_level=True)

import flax_model as toy
import flax_run as run
from flax import nnx

NAN, SPIKE, STEPS = 6, 50, 60
BAD = {NAN: np.nan, SPIKE: 100.0}


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def start(seed=0, tx=None):
    model = toy.Model(nnx.Rngs(seed))
    tx = run.make_tx(1e-2) if tx is None else tx
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.fixture(scope="module")
def guarded():
    (model, optimizer), rows = start(), []
    data = toy.batches(STEPS, BAD)
    run.train(model, optimizer, data, toy.mean_square, rows.append)
    return model, optimizer, rows


def test_both_bad_batches_are_skipped_and_no_other(guarded):
    model, _, rows = guarded
    skipped = [bool(row["skip/skipped"]) for row in rows]
    assert np.flatnonzero(skipped).tolist() == [NAN, SPIKE]
    assert all(np.isfinite(leaf).all() for leaf in arrays(nnx.state(model)))


def test_a_restart_ends_with_the_same_bits(guarded, tmp_path):
    model, optimizer = start()
    data = list(toy.batches(STEPS, BAD))
    run.train(model, optimizer, data[:30], toy.mean_square, lambda row: None)
    run.save(tmp_path / "run", model, optimizer)
    model, optimizer = start(seed=1)
    run.restore(tmp_path / "run", model, optimizer)
    run.train(model, optimizer, data[30:], toy.mean_square, lambda row: None)
    whole = arrays(nnx.state(guarded[:2]))
    for a, b in zip(whole, arrays(nnx.state((model, optimizer))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_the_guard_the_nan_ends_the_run():
    model, optimizer = start(tx=run.optax.adamw(1e-2))
    for batch in toy.batches(NAN + 2, BAD):
        run.step_before(model, optimizer, batch, toy.mean_square)
    assert not all(np.isfinite(leaf).all() for leaf in arrays(nnx.state(model)))


def test_linen_skips_as_well():
    data = list(toy.batches(STEPS, BAD))
    state = run.make_state(toy.Linen(), jax.random.key(0), data[0][0])
    skipped = []
    for x, y in data:
        state, _ = run.linen_step(state, x, y)
        skipped.append(bool(ost.metrics(state)["skip/skipped"]))
    assert np.flatnonzero(skipped).tolist() == [NAN, SPIKE]


def test_the_learning_rate_can_be_read():
    schedule = run.optax.schedules.linear_schedule(1e-2, 0.0, 10)
    model, optimizer = start(tx=run.make_tx_with_its_rate(schedule))
    data = toy.batches(5)
    run.train(model, optimizer, data, toy.mean_square, lambda row: None)
    assert run.rate_of(optimizer) == pytest.approx(0.6e-2)
