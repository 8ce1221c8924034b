"""Averages and intervals of ratios against float64 references and known coverage."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiers import full

from optax_stability._noise import _statistics
from optax_stability._noise._statistics import (
    Averages,
    init_averages,
    interval,
    longest_consistent,
)

# Some dozen roundings of float32.
ROUNDING = 1e-5


def remembered(trace, grad_sq, decays):
    """The averages of all memories after a stream of numbers."""
    averages = init_averages(1)
    step = jax.jit(_statistics.update_averages)
    for s, g, decay in zip(trace, grad_sq, decays, strict=True):
        averages = step(averages, jnp.float32([s]), jnp.float32([g]), decay)
    return averages


def learned(trace, grad_sq, decays, memory=0):
    """Those of one memory, by default the longest."""
    return jax.tree.map(lambda x: x[memory], remembered(trace, grad_sq, decays))


def reference(trace, grad_sq, decays):
    """Weights, weighted means and covariance of these means, in float64."""
    weights = np.ones(len(trace))
    for i in range(len(trace)):
        weights[:i] *= decays[i]
    x = np.array([trace, grad_sq], np.float64)
    total, total_sq = weights.sum(), np.square(weights).sum()
    mean = x @ weights / total
    apart = x - mean[:, None]
    covariance = (apart * weights) @ apart.T / (total - total_sq / total)
    return total**2 / total_sq, mean, covariance * total_sq / total**2


def fieller(mean, covariance, t):
    """Where |a − r·b| ≤ t·sd(a − r·b), as roots of the quadratic, in float64."""
    (a, b), ((saa, sab), (_, sbb)) = mean, covariance
    leading = b * b - t * t * sbb
    roots = np.roots([leading, -2 * (a * b - t * t * sab), a * a - t * t * saa])
    return leading, np.sort(roots)


def draw(seed, steps=40, snr=5.0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, steps))
    trace = 100 + 3 * noise[0]
    grad_sq = snr + 2 * noise[1] - noise[0]
    return trace, grad_sq, 0.9 + 0.09 * rng.random(steps)


@pytest.mark.parametrize(("memory", "power"), [(0, 1), (1, 3), (2, 10)])
@pytest.mark.parametrize("seed", range(2))
def test_averages_are_weighted_means_with_their_covariance(seed, memory, power):
    trace, grad_sq, decays = draw(seed)
    steps, mean, covariance = reference(trace, grad_sq, decays**power)
    averages = learned(trace, grad_sq, decays, memory)
    np.testing.assert_allclose(averages.steps[0], steps, rtol=ROUNDING)
    found = [averages.trace[0], averages.grad_sq[0]]
    np.testing.assert_allclose(found, mean, rtol=ROUNDING)
    root = np.array(
        [
            [averages.trace_spread[0], 0],
            [averages.shared_spread[0], averages.grad_sq_spread[0]],
        ],
        np.float64,
    )
    scale = averages.total[0] * (averages.steps[0] - 1)
    largest = np.abs(covariance).max()
    np.testing.assert_allclose(root @ root.T / scale, covariance, atol=1e-4 * largest)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_that_of_fieller(seed):
    stream = draw(seed)
    steps, mean, covariance = reference(*stream)
    found = interval(learned(*stream), 0.95)
    leading, roots = fieller(mean, covariance, stats.t.ppf(0.975, steps - 1))
    assert leading > 0
    assert found.valid[0]
    np.testing.assert_allclose([found.low[0], found.high[0]], roots, rtol=1e-4)
    np.testing.assert_allclose(found.ratio[0], mean[0] / mean[1], rtol=ROUNDING)


def test_without_an_upper_end_the_lower_one_is_that_of_fieller():
    trace, grad_sq, decays = draw(0, snr=0.3)
    steps, mean, covariance = reference(trace, grad_sq, decays)
    assert mean[1] > 0
    found = interval(learned(trace, grad_sq, decays), 0.95)
    leading, roots = fieller(mean, covariance, stats.t.ppf(0.975, steps - 1))
    assert leading < 0
    assert not found.valid[0]
    assert found.ratio[0] == 0
    np.testing.assert_allclose(found.low[0], roots[roots > 0], rtol=1e-4)
    assert found.high[0] == np.inf


def test_a_mean_below_zero_counts_as_zero():
    trace, grad_sq, decays = draw(0)
    ends = [
        interval(learned(trace, grad_sq - shift, decays), 0.95)
        for shift in (grad_sq.mean() + 0.2, 20.0, 1e3)
    ]
    assert not any(each.valid[0] for each in ends)
    lows = [float(each.low[0]) for each in ends]
    # The covariance with the trace stays; all else is the same.
    np.testing.assert_allclose(lows[1:], lows[0], rtol=0.05)
    assert lows[0] > 0


def test_where_nothing_is_known_nothing_is_claimed():
    for averages in (init_averages(1), learned([1.0, 2], [1.0, 1], [0.9] * 2)):
        found = interval(averages, 0.95)
        assert not found.valid[0]
        assert found.low[0] == 0
        assert found.high[0] == np.inf
        assert found.ratio[0] == 0
    assert interval(learned([1.0, 2, 1], [1.0, 1, 1], [0.9] * 3), 0.95).valid[0]


def test_no_noise_at_all_is_a_noise_scale_of_zero():
    found = interval(learned([0.0] * 4, [2.0] * 4, [0.9] * 4), 0.95)
    assert found.valid[0]
    np.testing.assert_array_equal([found.ratio[0], found.low[0], found.high[0]], 0)
    # And nothing at all is nothing known.
    assert not interval(learned([0.0] * 4, [0.0] * 4, [0.9] * 4), 0.95).valid[0]


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**80])
def test_the_interval_does_not_depend_on_the_unit(factor):
    """Squares of such numbers are beyond float32."""
    trace, grad_sq, decays = draw(1)
    expected = interval(learned(trace, grad_sq, decays), 0.95)
    scaled = interval(learned(factor * trace, factor * grad_sq, decays), 0.95)
    chex.assert_trees_all_equal(scaled, expected)


@pytest.mark.parametrize("width", [1e-3, 1e-4, 1e-5])
def test_a_narrow_interval_keeps_its_width(width):
    """A large model: S and G² of a step are all but certain."""
    rng = np.random.default_rng(0)
    trace, grad_sq = 1 + width * rng.standard_normal((2, 60))
    decays = np.full(60, 0.99)
    # Rounded as the library sees them.
    trace, grad_sq = (x.astype("f4").astype(float) for x in (trace, grad_sq))
    steps, mean, covariance = reference(trace, grad_sq, decays)
    found = interval(learned(trace, grad_sq, decays), 0.95)
    _, roots = fieller(mean, covariance, stats.t.ppf(0.975, steps - 1))
    np.testing.assert_allclose(found.high - found.low, roots[1] - roots[0], rtol=0.05)
    # And memories of one distribution go on agreeing.
    averages = remembered(trace, grad_sq, decays)
    chex.assert_trees_all_equal(longest_consistent(averages).steps, averages.steps[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e37])
@pytest.mark.parametrize("at", [0, 1, 20])
def test_what_is_not_finite_is_not_learned(bad, at):
    trace, grad_sq, decays = draw(2)
    expected = learned(trace, grad_sq, decays)
    decays = np.insert(decays, at, 0.5)
    for i in range(2):
        spoilt = [np.insert(x, at, 1.0) for x in (trace, grad_sq)]
        spoilt[i][at] = bad
        chex.assert_trees_all_equal(learned(*spoilt, decays), expected)


def test_student_quantiles():
    for confidence, dof in itertools.product((0.5, 0.8, 0.95), (2, 3, 10, 198)):
        found = _statistics.student_quantile(confidence, jnp.float32(dof))
        expected = stats.t.ppf((1 + confidence) / 2, dof)
        np.testing.assert_allclose(found, expected, rtol=0.01)
    # The tails are longer: from three degrees of freedom on also at 99 %.
    found = _statistics.student_quantile(0.99, jnp.float32(3))
    np.testing.assert_allclose(found, stats.t.ppf(0.995, 3), rtol=0.01)


# --- coverage --------------------------------------------------------------------

RUNS = 10_000


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4, 5))
def simulate(d, k, batch, b_simple, decay, steps):
    """The averages of many runs: isotropic Gaussian noise, ‖G‖² = 1, trace b_simple.

    S·(K−1)/σ² is χ² with d(K−1) degrees of freedom, and ‖ḡ‖² noncentral χ².
    """
    variance = b_simple / d

    def step(averages, key):
        keys = jax.random.split(key, 3)
        chi2 = 2 * jax.random.gamma(keys[0], d * (k - 1) / 2, (RUNS,))
        trace = variance * chi2 / (k - 1)
        along = 1 + jnp.sqrt(variance / batch) * jax.random.normal(keys[1], (RUNS,))
        across = 2 * jax.random.gamma(keys[2], (d - 1) / 2, (RUNS,))
        norm_sq = along**2 + variance / batch * across
        grad_sq = norm_sq - trace / batch
        return _statistics.update_averages(averages, trace, grad_sq, decay), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, init_averages(RUNS), keys)[0]


def delta_method(averages: Averages, b_simple):
    """Share of the usual, always finite intervals that hold the true ratio."""
    ratio = averages.trace / averages.grad_sq
    per_mean = 1 / (averages.total * (averages.steps - 1))
    along = averages.trace_spread / averages.trace
    shared = averages.shared_spread / averages.grad_sq
    beside = averages.grad_sq_spread / averages.grad_sq
    deviation = jnp.abs(ratio) * jnp.sqrt(
        per_mean * ((along - shared) ** 2 + beside**2)
    )
    return jnp.mean(jnp.abs(ratio - b_simple) < 1.96 * deviation)


# d, K, B, true noise scale, decay, steps: where the delta method fails.
HARD = {
    "three steps": (1000, 8, 32, 100.0, 0.99, 3),
    "five steps": (1000, 8, 32, 100.0, 0.99, 5),
    "five steps of two microbatches": (1000, 2, 32, 100.0, 0.99, 5),
    "short memory": (1000, 8, 32, 200.0, 0.8, 60),
    "few coordinates": (20, 4, 8, 10.0, 0.8, 60),
    "noise 60 times the batch": (1000, 8, 32, 2000.0, 0.97, 200),
}
HOPELESS = {
    "noise 1,500 times the batch": (1000, 8, 32, 50_000.0, 0.99, 600),
    "short memory": (1000, 8, 32, 5000.0, 0.9, 100),
}
# Four standard errors of a share near 0.95, of RUNS independent runs.
CHANCE = 4 * (0.95 * 0.05 / RUNS) ** 0.5


@pytest.mark.parametrize("setting", HARD.values(), ids=HARD)
@full
def test_the_interval_covers_where_the_delta_method_does_not(setting):
    averages, true = longest_consistent(simulate(*setting)), setting[3]
    found = interval(averages, 0.95)
    covered = jnp.mean((found.low <= true) & (true <= found.high))
    assert 0.93 <= covered <= 0.97
    assert delta_method(averages, true) < 0.93


@pytest.mark.parametrize("setting", HOPELESS.values(), ids=HOPELESS)
@full
def test_a_hopeless_case_is_called_so_and_its_bound_holds(setting):
    averages, true = longest_consistent(simulate(*setting)), setting[3]
    found = interval(averages, 0.95)
    assert jnp.mean(found.valid) < 0.1
    # A mean below 0 counts as 0, so that it errs on one side only: 2.5 %, not 5.
    covered = jnp.mean((found.low <= true) & (true <= found.high))
    assert 0.96 <= covered <= 0.98 + CHANCE
    assert delta_method(averages, true) < 0.75


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
@full
def test_the_confidence_is_kept(confidence):
    averages = longest_consistent(simulate(100, 8, 32, 50.0, 0.97, 200))
    found = interval(averages, confidence)
    covered = jnp.mean((found.low <= 50) & (found.high >= 50))
    np.testing.assert_allclose(covered, confidence, atol=0.03)


@full
def test_without_a_change_the_longest_memory_is_trusted():
    averages = simulate(1000, 8, 32, 200.0, 0.98, 300)
    assert jnp.mean(longest_consistent(averages).steps == averages.steps[0]) > 0.9


def test_of_memories_that_agree_the_longest_is_trusted_and_else_a_shorter_one():
    rng = np.random.default_rng(0)
    grad_sq = np.concatenate([np.full(200, 4.0), np.full(60, 1.0)])
    grad_sq += 0.1 * rng.standard_normal(260)
    trace, decays = 100 + rng.standard_normal(260), np.full(260, 0.99)
    before = remembered(trace[:200], grad_sq[:200], decays[:200])
    chex.assert_trees_all_equal(longest_consistent(before).steps, before.steps[0])
    after = remembered(trace, grad_sq, decays)
    chex.assert_trees_all_equal(longest_consistent(after).steps, after.steps[2])
    found = interval(longest_consistent(after), 0.95)
    assert found.low[0] < 100 < found.high[0]
    # The longest alone would be sure of what is no more.
    stale = interval(learned(trace, grad_sq, decays), 0.95)
    assert stale.high[0] < 60


def test_after_a_spike_a_short_memory_is_trusted_that_has_recovered():
    rng = np.random.default_rng(0)
    trace = 100 * rng.uniform(0.9, 1.1, 500)
    grad_sq = 2 * rng.uniform(0.7, 1.3, 500)
    trace[300], grad_sq[300] = 1e6, 1e4
    averages = remembered(trace, grad_sq, np.full(500, 0.99))
    assert interval(averages, 0.95).high[0, 0] == np.inf
    found = interval(longest_consistent(averages), 0.95)
    assert found.valid[0]
    assert found.low[0] < 50 < found.high[0]


def test_numbers_as_large_as_float32_holds_do_no_lasting_harm():
    rng = np.random.default_rng(0)
    normal = 100 + rng.standard_normal(60), 2 + 0.1 * rng.standard_normal(60)
    large = np.tile([0.0, 3e38], 6), np.tile([3e38, 0.0], 6)
    both = [np.concatenate(pair) for pair in zip(large, normal, strict=True)]
    averages = remembered(*both, np.full(72, 0.99))
    chex.assert_tree_all_finite(averages)
    found = interval(longest_consistent(averages), 0.95)
    assert found.low[0] < 50 < found.high[0]


def test_streams_trust_memories_of_their_own():
    steady, changed = draw(0, steps=250, snr=50.0), draw(1, steps=250, snr=50.0)
    changed[1][-20:] /= 10
    averages, decays = init_averages(2), np.full(250, 0.99)
    step = jax.jit(_statistics.update_averages)
    for s, g, decay in zip(
        *(np.stack(pair, 1) for pair in zip(steady[:2], changed[:2], strict=True)),
        decays,
        strict=True,
    ):
        averages = step(averages, s.astype("f4"), g.astype("f4"), decay)
    steps = longest_consistent(averages).steps
    assert steps[0] == averages.steps[0, 0]
    assert steps[1] < averages.steps[0, 1] / 2
