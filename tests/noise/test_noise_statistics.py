"""Averages and intervals of ratios against float64 references and known coverage."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from optax_stability._noise import _statistics
from optax_stability._noise._statistics import init_averages, interval

# Some dozen roundings of float32.
ROUNDING = 1e-5


def learned(trace, grad_sq, decays):
    """The averages after a stream of numbers."""
    averages = init_averages(1)
    step = jax.jit(_statistics.update_averages)
    for s, g, decay in zip(trace, grad_sq, decays, strict=True):
        averages = step(averages, jnp.float32([s]), jnp.float32([g]), decay)
    return averages


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


@pytest.mark.parametrize("power", [1, 3, 10])
@pytest.mark.parametrize("seed", range(2))
def test_averages_are_weighted_means_with_their_covariance(seed, power):
    trace, grad_sq, decays = draw(seed)
    steps, mean, covariance = reference(trace, grad_sq, decays**power)
    averages = learned(trace, grad_sq, decays**power)
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
    np.testing.assert_allclose(found.signal_low[0], 1 / roots[1], rtol=1e-4)


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
    # G²/S may be below 0: the other root.
    np.testing.assert_allclose(found.signal_low[0], 1 / roots[roots < 0], rtol=1e-4)


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
