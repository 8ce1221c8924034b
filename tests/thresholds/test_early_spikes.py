"""What a spike does to each threshold before it is armed: the table of the package."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import follow, noisy, run

from optax_stability import thresholds
from optax_stability.thresholds import (
    detrended_mad,
    ema_ratio,
    relearn,
    window_median,
    window_quantile,
    window_zscore,
    zscore,
)

# Each row of the table, and the number of values after which its limit is regular.
ROWS = {
    "zscore()": (zscore(), 25),
    "zscore(published=True)": (zscore(published=True), 25),
    "window_zscore()": (window_zscore(), 64),
    "window_zscore(published=True)": (window_zscore(published=True), 64),
    "window_quantile(0.9)": (window_quantile(0.9), 64),
    "window_median(3.0)": (window_median(3.0), 64),
    "ema_ratio()": (ema_ratio(), 100),
    "detrended_mad(5.0, floor=5.0)": (detrended_mad(5.0, floor=5.0), 25),
    "relearn(zscore(), after=25)": (relearn(zscore(), after=25), 25),
}
PLACES = (None, 0, 3, 10, 24)
SPIKE = 1e4
SECOND = 100.0


def level_with_a_spike(place):
    values = 1 + 0.1 * np.random.default_rng(0).standard_normal(200)
    if place is not None:
        values[place] = SPIKE
    return values.astype("f4")


def worst_clip(threshold, armed, place):
    """To what a second spike is clipped at most, in the hundred values after arming."""
    _, states = follow(threshold, level_with_a_spike(place))
    before = jax.tree.map(lambda x: x[armed - 1 : armed + 99], states)
    limits, _ = jax.vmap(threshold.update, (None, 0))(SECOND, before)
    return float(np.minimum(np.max(limits), SECOND))


def table():
    """The rows of the table in the docstring of the package."""
    rows = re.findall(r"^``(\S.*?)``((?: +[\d,.]+){5})$", thresholds.__doc__, re.M)
    return {name: numbers.split() for name, numbers in rows}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_of_early_spikes_is_what_happens(name):
    measured = [worst_clip(*ROWS[name], place) for place in PLACES]
    assert table()[name] == [f"{limit:,.1f}" for limit in measured]


@pytest.mark.parametrize("name", [n for n in ROWS if "published" not in n])
@pytest.mark.parametrize("size", [20.0, 1e4, 1e30])
def test_no_early_spike_makes_a_threshold_blind(name, size, monkeypatch):
    monkeypatch.setitem(globals(), "SPIKE", size)
    threshold, armed = ROWS[name]
    for place in PLACES[1:]:
        assert worst_clip(threshold, armed, place) < SECOND / 9


@pytest.mark.parametrize("rule", [zscore, window_zscore])
def test_without_an_early_spike_the_rule_is_the_published_one_bit_for_bit(rule):
    values = noisy(300)
    limits, states = run(rule(), values)
    published, published_states = run(rule(published=True), values)
    np.testing.assert_array_equal(limits, published)
    for ours, theirs in zip(states, published_states, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_spike_in_the_warm_up_of_zscore_is_learned_as_ten_times_the_mean():
    limits, states = run(zscore(warmup=5), [1.0, 3.0, 1e6])
    np.testing.assert_allclose(limits, [np.inf, np.inf, 20.0])
    np.testing.assert_allclose(states.mean[2], (1 + 3 + 20) / 3)
    np.testing.assert_allclose(states.std[2], np.std([1, 3, 20]), rtol=1e-6)


def test_the_warm_up_of_zscore_starts_again_at_a_tenth_of_its_mean():
    _, states = run(zscore(warmup=3), [1e6, 1.0, 1.2, 1.1])
    assert states.step.tolist() == [1, 1, 2, 3]
    np.testing.assert_allclose(states.mean, [1e6, 1.0, 1.1, 1.1], rtol=1e-6)
    _, armed = run(zscore(warmup=3), [1.0, 1.2, 1.1, 0.01])
    assert armed.step.tolist() == [1, 2, 3, 4]  # After the warm-up it never does.


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_what_is_no_level_does_not_start_the_warm_up_again(bad):
    threshold = zscore(warmup=5)
    _, states = run(threshold, [1.0, 1.2, bad])
    assert [jnp.asarray(x[2]) == x[1] for x in states] == [True] * len(states)


def between_two_levels(period):
    """A level, and fifty times as much, for ``period`` values each."""
    return np.resize([1.0] * period + [50.0] * period, 200)


# Each value is far below those before it, as long as float32 has such values.
FALLING = np.maximum(1e36 * 1.5e-3 ** np.arange(200.0), 1e-37)


@pytest.mark.parametrize("warmup", [1, 2, 5, 25])
@pytest.mark.parametrize(
    "values",
    [FALLING, *map(between_two_levels, (1, 2, 3, 5, 10, 24))],
    ids=["falling", *(f"two levels, {period}" for period in (1, 2, 3, 5, 10, 24))],
)
def test_the_warm_up_ends_before_twice_its_length_on_any_stream(values, warmup):
    _, states = run(zscore(warmup=warmup), values)
    assert states.step[2 * warmup - 2] >= warmup
    assert np.all(np.diff(states.step[2 * warmup - 2 :]) == 1)
    assert states.forgotten[-1] < warmup


def test_the_warm_up_starts_again_at_its_last_value_at_the_latest():
    high, low = [100.0] * 4, [1.0] * 8
    _, last = run(zscore(warmup=5), high + low)
    assert last.step.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]
    assert last.forgotten.tolist() == [0] * 4 + [4] * 8
    # The sixth value of a stream that has started again already is learned.
    _, again = run(zscore(warmup=5), [1e4, 100.0, 100.0, 100.0, 100.0, *low])
    assert again.step.tolist() == [1, *range(1, 13)]


def test_a_rise_in_the_warm_up_is_followed():
    """Ten times the mean is learned, so that no rise is abnormal for long."""
    values = [1e-3] * 5 + [1.0] * 15
    limits, _ = run(zscore(), values)
    assert 3 < np.sum(values > limits) < 8
    assert np.all(np.isinf(limits[-5:]))
