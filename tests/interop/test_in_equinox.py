"""Equinox: real modules with a NaN batch, a spike and a restart."""

import importlib.util

import jax
import numpy as np
import pytest

import optax_stability as ost

if importlib.util.find_spec("equinox") is None:
    pytest.skip("needs equinox", allow_module_level=True)

import equinox as eqx
import equinox_model as toy
import equinox_run as run

NAN, SPIKE, STEPS = 6, 50, 60
BAD = {NAN: np.nan, SPIKE: 100.0}


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


@pytest.fixture(scope="module")
def guarded():
    tx, rows = run.make_tx(1e-2), []
    step = run.make_step(toy.loss_fn, tx)
    data = toy.batches(STEPS, BAD)
    return run.train(step, tx, toy.make_model(), data, rows.append), rows


def test_both_bad_batches_are_skipped_and_no_other(guarded):
    (model, _), rows = guarded
    skipped = [bool(row["skip/skipped"]) for row in rows]
    assert np.flatnonzero(skipped).tolist() == [NAN, SPIKE]
    assert all(np.isfinite(leaf).all() for leaf in arrays(model))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_restart_ends_with_the_same_bits(guarded, tmp_path):
    tx = run.make_tx(1e-2)
    step = run.make_step(toy.loss_fn, tx)
    data = list(toy.batches(STEPS, BAD))
    half = run.train(step, tx, toy.make_model(), data[:30], lambda row: None)
    run.save(tmp_path / "run.eqx", *half)
    model, state = run.restore(tmp_path / "run.eqx", toy.make_model(1), tx)
    again = run.train(step, tx, model, data[30:], lambda row: None, state)
    for a, b in zip(arrays(guarded[0]), arrays(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_the_guard_the_nan_ends_the_run():
    tx = run.make_tx(1e-2)
    step = run.make_step_before(toy.loss_fn, run.optax.adamw(1e-2))
    tx, data = run.optax.adamw(1e-2), toy.batches(NAN + 2, BAD)
    model, _ = run.train(step, tx, toy.make_model(), data, lambda row: None)
    assert not all(np.isfinite(leaf).all() for leaf in arrays(model))


def test_microbatches_of_a_module_are_those_of_equinox():
    model, (batch,) = toy.make_model(), toy.batches(1)
    fn = eqx.filter_jit(ost.microbatch_gradients(toy.loss_fn, 4, vmap_size=1))
    loss, grads, _ = fn(model, batch)
    expected = eqx.filter_value_and_grad(toy.loss_fn)(model, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])
    for a, b in zip(arrays(grads), arrays(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_bad_microbatch_costs_no_step():
    tx = run.make_tx(1e-2)
    step = run.make_step_of_microbatches(toy.loss_fn, tx, 4)
    (x, y), rows = next(toy.batches(1)), []
    y[0] = np.nan
    model, _ = run.train(step, tx, toy.make_model(), [(x, y)], rows.append)
    assert not rows[0]["skip/skipped"]
    assert all(np.isfinite(leaf).all() for leaf in arrays(model))


def test_the_learning_rate_can_be_read():
    schedule = run.optax.schedules.linear_schedule(1e-2, 0.0, 10)
    tx = run.make_tx_with_its_rate(schedule)
    step = run.make_step(toy.loss_fn, tx)
    data = toy.batches(5)
    _, state = run.train(step, tx, toy.make_model(), data, lambda row: None)
    assert run.rate_of(state) == pytest.approx(0.6e-2)
