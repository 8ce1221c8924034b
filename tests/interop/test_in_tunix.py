"""Tunix: real steps of its trainer with a NaN batch, a spike and a restart."""

import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

import optax_stability as ost

if importlib.util.find_spec("tunix") is None:
    pytest.skip("needs google-tunix", allow_module_level=True)

import tunix_model as toy
import tunix_run as run

# Steps counted from 0: a batch that is NaN, and one of ten times the loss.
NAN, SPIKE, STEPS = 6, 35, 40
BAD = {NAN: np.nan, SPIKE: 10.0}


def curve(trainer, name):
    return trainer.metrics_logger.get_metric_history("", name, "train")


def arrays(node, kind=nnx.Param):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(node, kind))]


def train(make, steps=STEPS, folder=None, *, seed=0, lora=False, **options):
    model = toy.Model(nnx.Rngs(seed), lora=lora)
    config = toy.make_config(steps, folder, **options)
    trainer = make(model, toy.next_token_loss, config)
    trainer.train(toy.batches(100, BAD))
    return trainer


@pytest.fixture(scope="module")
def guarded():
    return train(run.make_trainer)


def test_both_bad_batches_are_skipped_and_no_other(guarded):
    assert np.flatnonzero(curve(guarded, "skip/skipped")).tolist() == [NAN, SPIKE]
    assert all(np.isfinite(leaf).all() for leaf in arrays(guarded.model))


def test_the_guard_is_told_the_loss_of_every_step(guarded):
    loss = curve(guarded, "loss")
    assert len(loss) == STEPS
    np.testing.assert_allclose(curve(guarded, "skip/value"), loss, rtol=1e-5)


def test_the_learning_rate_is_logged(guarded):
    rate = curve(guarded, "learning_rate")
    assert rate.max() == pytest.approx(1e-2, rel=1e-3)


def test_the_probe_stays_zero(guarded):
    np.testing.assert_array_equal(guarded.model.loss_probe[...], 0.0)


def test_a_restart_ends_with_the_same_bits(guarded, tmp_path):
    """History of the thresholds and counters come back with the parameters."""
    train(run.make_trainer, STEPS // 2, tmp_path)
    again = train(run.make_trainer, STEPS, tmp_path, seed=1)
    assert len(curve(again, "loss")) == STEPS // 2
    for kind, whole, parts in (
        (nnx.Param, guarded.model, again.model),
        (nnx.optimizer.OptState, guarded.optimizer, again.optimizer),
    ):
        for a, b in zip(arrays(whole, kind), arrays(parts, kind), strict=True):
            np.testing.assert_array_equal(a, b)


def test_without_the_guard_the_nan_ends_the_run():
    trainer = train(run.make_trainer_before, NAN + 2)
    assert not all(np.isfinite(leaf).all() for leaf in arrays(trainer.model))


def test_norms_alone_need_no_probe():
    trainer = train(run.make_trainer_of_norms, NAN + 2)
    assert np.flatnonzero(curve(trainer, "skip/skipped")).tolist() == [NAN]
    assert all(np.isfinite(leaf).all() for leaf in arrays(trainer.model))


def test_adapters_are_trained_alone():
    def make(model, loss_fn, config):
        model.loss_probe = nnx.LoRAParam(ost.loss_probe())
        tx = ost.with_loss_probe(run.guarded(1e-2))
        trainer = run.GuardedTrainer(model, tx, config)
        return trainer.with_loss_fn(ost.probed(loss_fn))

    trainer = train(make, NAN + 2, lora=True)
    np.testing.assert_allclose(
        curve(trainer, "skip/value"), curve(trainer, "loss"), rtol=1e-5
    )
    assert np.flatnonzero(curve(trainer, "skip/skipped")).tolist() == [NAN]


def test_its_own_accumulation_keeps_a_nan_and_the_diagnosis_says_so():
    def make(model, loss_fn, config):
        tx = ost.record_history(ost.spike_guard(ost.safe_adamw(1e-2), loss=False))
        return run.peft_trainer.PeftTrainer(model, tx, config).with_loss_fn(loss_fn)

    trainer = train(make, STEPS // 2, gradient_accumulation_steps=2)
    assert ost.metrics(trainer.optimizer)["skip/total"] == STEPS // 2 - NAN // 2
    found = ost.diagnose(ost.history(trainer.optimizer))
    assert "MultiSteps" in str(found[0])


def test_accumulate_moments_leaves_the_bad_microbatch_out():
    def make(model, loss_fn, config):
        return run.make_accumulating_trainer(model, loss_fn, config, every_k=2)

    trainer = train(make, STEPS // 2)
    metrics = ost.metrics(trainer.optimizer)
    assert (metrics["skip/total"], metrics["accumulate/rejected_total"]) == (0, 1)
    assert np.isfinite(metrics["skip/value"])
