"""The limit of a threshold, lowered to the median of the last values."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import follow, run

from optax_stability.thresholds import (
    at_most_median,
    constant,
    relearn,
    window_median,
    zscore,
)

ROUNDING = 1e-6
WINDOW = 4


def reference(values, outlier_limits, window, warmup):
    """The rule in float64, from the equations of the docstring."""
    learned, limits = [], []
    for x, outlier_limit in zip(values, outlier_limits, strict=True):
        can_be_learned = np.isfinite(x) and x > 0
        usual = x if can_be_learned else np.inf
        if learned:
            usual = np.median(learned[-window:])
        share = min(1, (len(learned) + 1) / warmup)
        limits.append(min(outlier_limit, share * usual))
        if can_be_learned:
            learned.append(min(x, outlier_limit))
    return limits


VALUES = st.floats(2**-10, 2**10, width=32) | st.sampled_from(
    [0.0, np.nan, np.inf, -np.inf, 2.0**100, 2.0**-100]
)
OUTLIERS = {"constant": constant(10.0), "relearn": relearn(zscore(warmup=2), after=3)}


@functools.cache
def compiled(name, **sizes):
    inner = OUTLIERS[name]
    threshold = at_most_median(inner, **sizes) if sizes else inner
    return jax.jit(functools.partial(follow, threshold))


@pytest.mark.parametrize("name", OUTLIERS)
@pytest.mark.parametrize(("window", "warmup"), [(2, 5), (3, 1), (16, 32)])
@settings(deadline=None)
@given(values=st.lists(VALUES, min_size=25, max_size=25))
def test_it_is_the_lower_of_both_on_any_stream(name, window, warmup, values):
    values = np.array(values, np.float32)
    outlier_limits, alone = compiled(name)(values)
    limits, states = compiled(name, window=window, warmup=warmup)(values)
    in_float64 = np.float64(values), np.float64(outlier_limits)
    expected = reference(*in_float64, window, warmup)
    np.testing.assert_allclose(limits, expected, rtol=ROUNDING)
    # What it wraps does not know that it is wrapped.
    jax.tree.map(np.testing.assert_array_equal, states.inner, alone)


def test_the_limit_does_not_creep_downwards():
    """The median clips half of the values; what it has clipped is learned unclipped."""
    rng = np.random.default_rng(0)
    values = np.exp(0.3 * rng.standard_normal(2000))
    limits, _ = run(at_most_median(constant(np.inf)), values)
    assert np.median(limits[1000:]) == pytest.approx(1.0, abs=0.02)
    assert np.mean(values[100:] > limits[100:]) == pytest.approx(0.5, abs=0.03)


def test_norms_that_fall_in_the_first_steps_are_even():
    """A tenfold fall within 32 steps, which Adam would remember for as long again."""
    values = np.maximum(10.0 ** -(np.arange(64) / 32), 0.1)
    limits, _ = run(at_most_median(constant(np.inf)), values)
    evened = np.minimum(values, limits)
    assert evened.max() / evened[-1] < 4.0
    without, _ = run(at_most_median(constant(np.inf), warmup=1), values)
    assert np.minimum(values, without).max() / values[-1] > 9.0


@pytest.mark.parametrize("size", [100.0, 1e30])
def test_outliers_below_half_a_window_leave_it_at_an_ordinary_value(size):
    rng = np.random.default_rng(1)
    ordinary = np.exp(0.1 * rng.standard_normal(16))
    values = [*ordinary, *[size] * 7, 1.0]
    limits, _ = run(at_most_median(constant(np.inf)), values)
    assert limits[-1] <= ordinary.max()
    # With a rule for outliers not even a long burst does, until it is relearned.
    burst = [*np.resize(ordinary, 60), *[size] * 20, 1.0]
    limits, _ = run(at_most_median(relearn(zscore(), after=25)), burst)
    assert limits[-1] <= 1.5 * ordinary.max()


def test_a_new_level_is_accepted_when_the_wrapped_threshold_accepts_it():
    values = [1.0, 1.1, 0.9] * 20 + [9.0, 10.0, 11.0] * 20
    alone, _ = run(relearn(zscore(), after=25), values)
    limits, _ = run(at_most_median(relearn(zscore(), after=25)), values)
    assert limits[60 + 24] < 1.2
    assert limits[60 + 24 + 16] == pytest.approx(10.0, abs=1.0)
    assert np.all(limits <= alone)


def test_rebase_scales_the_window_and_what_it_wraps():
    threshold = at_most_median(
        window_median(3.0, window=WINDOW), window=WINDOW, warmup=1
    )
    _, states = run(threshold, [1.0, 2.0, 3.0, 4.0])
    last = jax.tree.map(lambda x: x[-1], states)
    rebased = threshold.rebase(5.0, last)
    np.testing.assert_allclose(rebased.window.values, [2, 4, 6, 8], rtol=ROUNDING)
    np.testing.assert_allclose(rebased.inner.values, [2, 4, 6, 8], rtol=ROUNDING)
    assert threshold.update(1.0, rebased)[0] == pytest.approx(5.0)
    for bad in (0.0, np.nan, np.inf):
        unchanged = threshold.rebase(bad, last)
        jax.tree.map(np.testing.assert_array_equal, unchanged, last)
    fresh = threshold.rebase(5.0, threshold.init())
    assert threshold.update(1.0, fresh)[0] == pytest.approx(5.0)
