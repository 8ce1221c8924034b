"""The benchmark of batch-size invariance measures what it says, and finds it."""

import batch_invariance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reporting
from tiers import full, long_run

NOISE, EVEN, SIGNAL = (regime.name for regime in batch_invariance.REGIMES)
OURS, SQRT, LINEAR = batch_invariance.OPTIMIZERS
# Three standard errors of the quick run are 2 % of a ratio, and 0.4 % of ours.
SPREAD = 3 * 0.007


def stored():
    return reporting.read("batch_invariance")["b2"]


def ratio(rows, optimizer, k, regime):
    return rows[optimizer][str(k)][regime]["ratio"]


def distance(regime, k):
    """Mean update of plain Adam per step: μ over the root of μ² + σ²/K."""
    return regime.mean / np.sqrt(regime.mean**2 + regime.spread**2 / k)


# One test, because it is one run of ten seconds.
@full
@long_run
def test_ours_goes_as_far_as_with_one_microbatch_per_step_and_plain_adam_does_not():
    rows = batch_invariance.measure(0.999, batch_invariance.QUICK)
    assert batch_invariance.largest_error(rows) < 0.007
    assert batch_invariance.largest_error({OURS: rows[OURS]}) < 0.0013
    for k in batch_invariance.SPLITS:
        for regime in batch_invariance.REGIMES:
            relative = distance(regime, k) / distance(regime, 1)
            for optimizer, expected, spread in (
                (OURS, 1.0, 0.005),
                (SQRT, relative / np.sqrt(k), SPREAD),
                (LINEAR, relative, SPREAD),
            ):
                found = ratio(rows, optimizer, k, regime.name)
                assert found == pytest.approx(expected, rel=spread), (optimizer, k)


@pytest.mark.parametrize("b2", ["0.999", "0.95"])
def test_the_full_run_stayed_within_a_percent(b2):
    rows = stored()[b2]
    assert batch_invariance.largest_error(rows) < 0.002
    for k in batch_invariance.SPLITS:
        for regime in (NOISE, EVEN, SIGNAL):
            assert ratio(rows, OURS, k, regime) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("optimizer", "k", "regime", "expected"),
    [
        (SQRT, 8, EVEN, 0.47),
        (SQRT, 32, EVEN, 0.25),
        (SQRT, 8, SIGNAL, 0.35),
        (SQRT, 32, SIGNAL, 0.18),
        (LINEAR, 8, NOISE, 2.80),
        (LINEAR, 32, NOISE, 5.45),
    ],
)
def test_each_rule_of_plain_adam_is_wrong_in_one_regime(optimizer, k, regime, expected):
    for rows in stored().values():
        found = ratio(rows, optimizer, k, regime)
        assert found == pytest.approx(expected, rel=0.02)


def test_both_sides_of_a_ratio_are_measured_on_the_same_gradients():
    def sgd(k, b2):
        return optax.MultiSteps(optax.sgd(1.0 * k), lambda step: k)

    size = batch_invariance.Size(coordinates=16, warm_up=32, counted=64)
    far = batch_invariance.displacements(sgd, 0.999, size)
    assert list(far) == [1, 8, 32]
    assert far[1].shape == (3, 16)
    for k in (8, 32):
        np.testing.assert_allclose(far[k], far[1], rtol=1e-4, atol=1e-4)
    # −Σg of the 64 that count, each of mean μ and spread σ; four deviations.
    for found, (mean, spread) in zip(far[1], batch_invariance.REGIMES, strict=True):
        error = 4 * spread * np.sqrt(64 / 16)
        assert found.mean() == pytest.approx(-64 * mean, abs=error)
        assert found.std() == pytest.approx(8 * spread, rel=0.8)


@pytest.mark.parametrize(("name", "rate"), [(OURS, 8), (SQRT, 8**0.5), (LINEAR, 8)])
def test_every_optimizer_takes_one_step_for_k_microbatches(name, rate):
    tx, params = batch_invariance.OPTIMIZERS[name](jnp.int32(8), 0.999), jnp.zeros(4)

    def advance(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    grads = jnp.ones((16, 4))
    _, updates = jax.jit(lambda *a: jax.lax.scan(advance, *a))(tx.init(params), grads)
    expected = np.zeros((16, 4))
    expected[[7, 15]] = -rate * batch_invariance.LEARNING_RATE
    np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_the_comparison_is_a_ratio_of_means_with_its_error():
    rng = np.random.default_rng(0)
    base = 1 + rng.standard_normal(10_000)
    found = 2 * base + 0.1 * rng.standard_normal(10_000)
    compared = batch_invariance.compare(found, base)
    assert compared["standard_error"] == pytest.approx(0.1 / 100 / base.mean(), rel=0.1)
    assert compared["ratio"] == pytest.approx(2, abs=4 * compared["standard_error"])


def test_the_table_has_a_row_for_every_optimizer_and_k():
    rows = stored()["0.999"]
    header, rule, *lines = batch_invariance.table(rows).splitlines()
    assert header.count("|") == rule.count("|") == 6
    assert len(lines) == len(batch_invariance.OPTIMIZERS) * 2
    assert lines[0].startswith('| second_moment="microbatch", lr × K | 8 | 1.000 |')
