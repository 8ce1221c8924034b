"""Window thresholds: deviation, quantile and median of the last values, as in NumPy."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import compiled, follow, last, noisy, run, signature, together
from tiers import full, quick_only

from optax_stability import thresholds

# A few float32 roundings.
ROUNDING = 1e-6
# One rounding of a value (6e-8 of the largest in the window) over a deviation of a
# tenth of it, times six deviations.
STATISTICS = 1e-5

WINDOW = 128
# Above the smallest normal number even when halved; below it backends flush.
TINY = 3e-38
NOT_A_LEVEL = (np.nan, np.inf, -np.inf, 0.0, -1.0)


def published_zscore(past, num_sigmas=6.0):
    deviation = np.std(past, ddof=1) if len(past) > 1 else 0.0
    return np.mean(past) + num_sigmas * max(deviation, 1e-6 * np.mean(past))


def published_quantile(past, q=0.9):
    return np.quantile(past, q)


def published_median(past, ratio=3.0):
    return ratio * np.median(past)


RULES = {
    "zscore": (
        functools.partial(thresholds.window_zscore, published=True),
        published_zscore,
    ),
    "zscore of 2": (
        functools.partial(thresholds.window_zscore, 2.0, published=True),
        functools.partial(published_zscore, num_sigmas=2.0),
    ),
    "quantile 0.9": (
        functools.partial(thresholds.window_quantile, 0.9),
        published_quantile,
    ),
    "quantile 0.1": (
        functools.partial(thresholds.window_quantile, 0.1),
        functools.partial(published_quantile, q=0.1),
    ),
    "quantile 1": (
        functools.partial(thresholds.window_quantile, 1.0),
        functools.partial(published_quantile, q=1.0),
    ),
    "median": (functools.partial(thresholds.window_median, 3.0), published_median),
}
# Of each kind one with the default window and a short one.
LONG = {
    "zscore": thresholds.window_zscore(),
    "quantile": thresholds.window_quantile(0.9),
    "median": thresholds.window_median(3.0),
}
SHORT = {
    "zscore": thresholds.window_zscore(window=5),
    "quantile": thresholds.window_quantile(0.9, window=5),
    "median": thresholds.window_median(3.0, window=4),
}
EVERY = SHORT | {
    f"relearn {name}": thresholds.relearn(each, after=3) for name, each in SHORT.items()
}


def reference(published, values, window):
    """The limits of a rule on the last values that are levels, in float64."""
    past, limits = [], []
    for x in np.asarray(values, np.float64):
        armed = len(past) >= window // 2
        limits.append(published(past[-window:]) if armed else np.inf)
        if np.isfinite(x) and x > 0:
            past.append(x)
    return np.array(limits)


BEFORE, AFTER = WINDOW, 130


@functools.cache
def shifted(factor, noise=0.05):
    """Nine streams that rise for good; the first has no noise."""
    rng = np.random.default_rng(0)
    values = np.exp(noise * rng.standard_normal((9, BEFORE + AFTER)))
    values[0] = 1.0
    values[:, BEFORE:] *= factor
    return values.astype(np.float32)


def limits_of(threshold, streams):
    return np.asarray(together(threshold)(streams)[0])


def above_after_the_rise(threshold, factor):
    """Which values are above their limits, for the still stream and the noisy ones."""
    streams = shifted(factor)
    above = (streams > limits_of(threshold, streams))[:, BEFORE:]
    return above[0], above[1:]


# --- the rules -------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 5, 10, 128])
@pytest.mark.parametrize("rule", RULES)
def test_it_follows_the_published_rule_over_hundreds_of_noisy_values(rule, window):
    make, published = RULES[rule]
    values = noisy(400, seed=1, spikes=0.02)

    limits, states = run(make(window=window), values)

    expected = reference(published, values, window)
    rtol = ROUNDING if rule == "median" else STATISTICS
    np.testing.assert_allclose(limits, expected, rtol=rtol)
    assert np.isinf(limits[: window // 2]).all()
    assert np.isfinite(limits[window // 2 :]).all()
    np.testing.assert_array_equal(states.step, np.arange(1, 401))
    above = (values > limits)[-200:]
    if rule in ("zscore", "quantile 0.9", "median") and window > 2:
        assert above.any()
        assert not above.all()


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # Past (1), (1, 3), (1, 3, 2), (1, 3, 2, 10), (3, 2, 10, 4); armed by two.
        # Means 2, 2, 4, 4.75; sums of squared distances 2, 2, 50, 38.75.
        (
            functools.partial(thresholds.window_zscore, 2.0),
            [
                2 + 2 * np.sqrt(2),
                2 + 2 * 1,
                4 + 2 * np.sqrt(50 / 3),
                4.75 + 2 * np.sqrt(38.75 / 3),
            ],
        ),
        # Places ¾, 1½, 2¼, 2¼ in (1, 3), (1, 2, 3), (1, 2, 3, 10), (2, 3, 4, 10).
        (
            functools.partial(thresholds.window_quantile, 0.75),
            [2.5, 2.5, 4.75, 5.5],
        ),
        (functools.partial(thresholds.window_median, 3.0), [6.0, 6.0, 7.5, 10.5]),
    ],
    ids=["zscore", "quantile", "median"],
)
def test_worked_by_hand_with_a_window_of_four(threshold, expected):
    limits, states = run(threshold(window=4), [1.0, 3.0, 2.0, 10.0, 4.0, 5.0])
    np.testing.assert_array_equal(limits[:2], np.inf)
    np.testing.assert_allclose(limits[2:], expected, rtol=ROUNDING)
    np.testing.assert_array_equal(states.values[1], [0, 0, 1, 3])
    np.testing.assert_array_equal(states.values[-1], [2, 10, 4, 5])


def test_the_defaults_are_six_deviations_and_a_window_of_128():
    def computation(threshold):
        state = jax.eval_shape(threshold.init)
        return str(jax.make_jaxpr(threshold.update)(1.0, state))

    for defaults, written_out in (
        (thresholds.window_zscore(), thresholds.window_zscore(6.0, window=128)),
        (LONG["quantile"], thresholds.window_quantile(0.9, window=128)),
        (LONG["median"], thresholds.window_median(3.0, window=128)),
    ):
        assert computation(defaults) == computation(written_out)


@pytest.mark.parametrize("threshold", SHORT.values(), ids=SHORT.keys())
def test_the_limit_comes_from_the_past_alone(threshold):
    state = last(run(threshold, noisy(12))[1])
    limits = [compiled(threshold.update)(x, state)[0] for x in (1e-30, 1.0, 1e30)]
    assert limits[0] == limits[1] == limits[2]


@pytest.mark.parametrize("threshold", SHORT.values(), ids=SHORT.keys())
def test_a_value_above_the_limit_is_learned_raw(threshold):
    _, states = run(threshold, [1.0, 1.1, 0.9, 1.0, 1e6])
    assert states.values[-1][-1] == np.float32(1e6)


@pytest.mark.parametrize("exponent", [-60, -1, 1, 60])
@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_power_of_two_scales_every_limit_bit_for_bit(threshold, exponent):
    values = np.concatenate([noisy(60, spikes=0.05), noisy(40, level=20.0)])
    factor = np.float32(2.0**exponent)
    limits, _ = run(threshold, values)
    scaled, _ = run(threshold, values * factor)
    np.testing.assert_array_equal(scaled, limits * factor)


@pytest.mark.parametrize("level", [1e-20, 1.0, 3.14159, 1e20, 3e38])
@pytest.mark.parametrize("rule", ["zscore", "median"])
def test_a_constant_stream_and_the_rounding_of_it_are_normal(rule, level):
    level = np.float32(level)
    next_above = np.nextafter(level, np.float32(np.inf))
    limits, _ = run(SHORT[rule], [level] * 9 + [next_above])
    assert (limits >= level).all()
    assert next_above <= limits[-1]


# --- what is never learned -------------------------------------------------------


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_value_that_is_no_level_is_not_learned_at_any_step(threshold):
    good = noisy(12, spikes=0.1)
    rows = [[*NOT_A_LEVEL, x] for x in good]
    limits, states = run(threshold, np.concatenate(rows))

    expected_limits, expected = run(threshold, good)
    # A bad value meets the limit of the good one that follows it.
    found = limits.reshape(12, -1)
    np.testing.assert_array_equal(found[:, -1], expected_limits)
    np.testing.assert_array_equal(found, np.tile(found[:, -1:], found.shape[1]))
    inner, expected = (getattr(each, "inner", each) for each in (states, expected))
    after_good = jax.tree.map(lambda x: x[len(NOT_A_LEVEL) :: 6], inner)
    chex.assert_trees_all_equal(after_good, expected)
    assert not np.isnan(limits).any()


def test_one_nan_does_not_disable_the_rule_for_a_window():
    limits, _ = run(LONG["zscore"], [*noisy(100), np.nan, 1e3])
    assert limits[-1] < 20


# --- edge cases ------------------------------------------------------------------


def test_zscore_hides_the_next_outlier_for_a_window_and_no_longer():
    # One value X among n: mean + 6·std = X/n + 6·X/√n = 0.54·X at n = 128.
    values = np.concatenate([noisy(WINDOW), [1000.0], noisy(WINDOW + 1, seed=1)])
    limits, _ = run(LONG["zscore"], values)
    hidden = limits[WINDOW + 1 : 2 * WINDOW + 1]
    np.testing.assert_allclose(hidden, 540, rtol=0.02)
    assert limits[WINDOW] < 5
    assert limits[2 * WINDOW + 1] < 5


def test_zscore_is_blind_while_the_stream_falls():
    limits, _ = run(LONG["zscore"], np.exp(-np.arange(200) / 30))
    assert limits[-1] > 100 * np.exp(-199 / 30)


@full
def test_the_quantile_calls_a_share_of_1_minus_q_abnormal():
    values = noisy(4000) / noisy(4000, seed=1)
    limits, _ = run(LONG["quantile"], values)
    # Independent values are above the k-th of n with chance 1 − k/(n + 1), and k/n is
    # within 1/n of q. 4 000 of them scatter by √(0.1·0.9/4000) = 0.005.
    above = (values > limits)[WINDOW:].mean()
    assert above == pytest.approx(0.1, abs=1 / WINDOW + 3 * 0.005)


@pytest.mark.parametrize("window", [5, 8, 128])
def test_outliers_below_half_a_window_do_not_move_the_median_beyond_a_normal_value(
    window,
):
    outliers = (window - 1) // 2
    normal = noisy(window)
    values = [*normal, *[1e30] * outliers, 1.0]
    limits, _ = run(thresholds.window_median(3.0, window=window), values)
    assert limits[-1] <= 3 * normal.max() * (1 + ROUNDING)
    if window % 2:  # one more and half the window is outliers
        more = [*normal, *[1e30] * (outliers + 1), 1.0]
        assert run(thresholds.window_median(3.0, window=window), more)[0][-1] > 1e29


@pytest.mark.parametrize("factor", [10.0, 50.0, 1e6])
@pytest.mark.parametrize(
    ("threshold", "still", "least", "most"),
    [
        # 128/(6² + 1) = 3.5, rounded up.
        (LONG["zscore"], 4, 3, 5),
        # 128/(3² + 1) = 12.8, rounded up.
        (thresholds.window_zscore(3.0), 13, 8, 24),
        # Place 0.9·127 = 114.3 of 0…127 is of the new level when 14 values are.
        (LONG["quantile"], 14, 14, 30),
        # Place 0.1·127 = 12.7: when 116 are.
        (thresholds.window_quantile(0.1), 116, 116, AFTER),
        (LONG["median"], 64, 64, 64),
    ],
    ids=["zscore", "zscore of 3", "quantile 0.9", "quantile 0.1", "median"],
)
def test_how_many_values_of_a_lasting_rise_are_abnormal(
    threshold, still, least, most, factor
):
    without_noise, noisy_ones = above_after_the_rise(threshold, factor)
    assert without_noise[:still].all()
    assert not without_noise[still:].any()
    first_normal = np.where(noisy_ones.all(1), AFTER, noisy_ones.argmin(1))
    assert (first_normal >= least - 1).all()
    assert (first_normal <= most).all()
    if still in (4, 64):  # of these none is abnormal once it is followed
        assert (noisy_ones.sum(1) >= least).all()
        assert (noisy_ones.sum(1) <= most).all()


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
@pytest.mark.parametrize(
    "values",
    [
        [TINY] * 12,
        [3e38] * 12,
        [TINY, 3e38] * 6,
        [TINY] * 6 + [3e38] * 6,
        [3e38] * 6 + [TINY] * 6,
    ],
    ids=["tiny", "huge", "in turn", "tiny, then huge", "huge, then tiny"],
)
def test_extreme_values_keep_the_state_finite_and_the_limit_a_number(threshold, values):
    limits, states = run(threshold, values)
    chex.assert_tree_all_finite(states)
    assert not np.isnan(limits).any()
    assert np.isfinite(limits[-1])
    assert limits[-1] > 0


@pytest.mark.parametrize("level", [1e-30, 1.0, 1e30])
def test_the_deviation_neither_overflows_nor_vanishes(level):
    values = noisy(8) * np.float32(level)
    limits, _ = run(SHORT["zscore"], values)
    expected = reference(published_zscore, values, 5)
    np.testing.assert_allclose(limits, expected, rtol=STATISTICS)


# --- rebase ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 4, 9, 10], ids="{} values".format)
@pytest.mark.parametrize("level", [1e-6, 7.0, 1e6])
def test_rebase_gives_the_window_the_new_median_and_its_old_relative_spread(
    level, steps
):
    threshold = SHORT["zscore"]
    state = last(run(threshold, noisy(steps, spikes=0.1))[1])
    rebased = compiled(threshold.rebase)(level, state)

    known = min(steps, 5)
    before, after = (np.float64(each.values[-known:]) for each in (state, rebased))
    assert np.median(after) == pytest.approx(level, rel=ROUNDING)
    relative = (each / np.median(each) for each in (after, before))
    np.testing.assert_allclose(*relative, rtol=ROUNDING)
    np.testing.assert_array_equal(rebased.values[:-known], 0.0)
    assert rebased.step == state.step


@pytest.mark.parametrize("rule", SHORT)
def test_rebase_moves_the_limit_with_the_level(rule):
    threshold = SHORT[rule]
    state = last(run(threshold, noisy(9))[1])
    rebased = compiled(threshold.rebase)(40.0, state)
    before, after = (run(threshold, [1.0], each)[0][0] for each in (state, rebased))
    size = state.values.shape[0]
    level = np.median(state.values[-size:])
    assert after / 40.0 == pytest.approx(before / level, rel=STATISTICS)


@pytest.mark.parametrize("rule", SHORT)
@quick_only("zscore", "median")
def test_rebase_of_a_fresh_threshold_learns_the_value(rule):
    threshold = SHORT[rule]
    rebased = compiled(threshold.rebase)(7.0, threshold.init())
    chex.assert_trees_all_equal(rebased, threshold.update(7.0, threshold.init())[1])
    assert rebased.step == 1
    assert rebased.values[-1] == 7


@pytest.mark.parametrize("rule", SHORT)
def test_rebase_to_what_is_no_level_changes_nothing(rule):
    threshold = SHORT[rule]
    for state in (threshold.init(), last(run(threshold, noisy(9))[1])):
        for bad in NOT_A_LEVEL:
            chex.assert_trees_all_equal(compiled(threshold.rebase)(bad, state), state)


@pytest.mark.parametrize("level", [1e-38, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("past", [1e-38, 1.0, 3e38])
def test_rebase_by_any_factor_keeps_the_state_finite(past, level):
    threshold = SHORT["median"]
    values = np.minimum(np.float64([0.9, 1.0, 1.1, 1.0, 1e9]) * past, 3.4e38)
    state = last(run(threshold, values)[1])
    rebased = compiled(threshold.rebase)(level, state)
    chex.assert_tree_all_finite(rebased)
    assert not np.isnan(run(threshold, [1.0], rebased)[0]).any()


# --- relearn ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "after", "abnormal"),
    [
        ("zscore", 2, {10.0: 2, 50.0: 2}),
        ("zscore", 25, {10.0: 4, 50.0: 4}),
        # Another row for ×50, in which the window itself follows after 4 more.
        ("quantile", 10, {10.0: 10, 50.0: 14}),
        # Ten limits are thirty medians, and three of those are a limit of ninety.
        ("median", 25, {10.0: 25, 50.0: 25}),
    ],
)
@quick_only("zscore-25-abnormal1")
def test_relearn_accepts_a_level_shift_within_a_row_per_factor(rule, after, abnormal):
    threshold = thresholds.relearn(LONG[rule], after=after)
    for factor, expected in abnormal.items():
        still, noisy_ones = above_after_the_rise(threshold, factor)
        assert still[:expected].all()
        assert not still[expected:].any()
        # The count that a noisy rise takes without relearn varies by half of it.
        rows = 1 if factor == 10 else 2
        assert (noisy_ones.argmin(1) <= rows * after + after // 2).all()


# --- every window threshold ------------------------------------------------------


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
@quick_only("median", "quantile")
def test_a_scan_over_fifty_streams_equals_fifty_loops(threshold):
    streams = np.stack(
        [noisy(12, seed=s, level=10.0 ** (s % 9), spikes=0.1) for s in range(50)]
    )
    streams[0, 7], streams[1, 0], streams[2, 10] = np.nan, np.inf, 0.0
    found = jax.tree.map(np.asarray, together(threshold)(streams))
    for i, stream in enumerate(streams):
        limits, states = jax.tree.map(lambda x, i=i: x[i], found)
        expected_limits, expected = run(threshold, stream)
        np.testing.assert_allclose(limits, expected_limits, rtol=STATISTICS)
        chex.assert_trees_all_close(states, expected, rtol=ROUNDING)


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
@pytest.mark.parametrize(
    "x",
    [1.5, np.float64(1.5), np.float32(1.5), jnp.bfloat16(1.5), jnp.asarray(1.5)],
    ids=["float", "numpy", "float32", "bfloat16", "weak"],
)
def test_the_state_keeps_its_structure_shapes_dtypes_and_weak_types(threshold, x):
    state = jax.eval_shape(threshold.init)
    limit, updated = jax.eval_shape(threshold.update, x, state)
    assert (limit.shape, limit.dtype) == ((), jnp.float32)
    assert signature(updated) == signature(state)
    assert signature(jax.eval_shape(threshold.rebase, x, state)) == signature(state)


@pytest.mark.parametrize("window", [2, 3, 128])
def test_the_state_is_a_count_and_the_window(window):
    for make, _ in RULES.values():
        state = make(window=window).init()
        assert signature(state) == thresholds.WindowState(
            ((), "int32", False), ((window,), "float32", False)
        )


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (thresholds.window_zscore, 2.5),
        (thresholds.window_quantile, 0.75),
        (thresholds.window_median, 2.5),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_traced_hyperparameter_equals_a_static_one(make, value, dtype):
    values = noisy(30, spikes=0.1)

    @jax.jit
    def traced(values, value):
        return follow(make(value, window=5), values)

    limits, states = traced(values, dtype(value))
    expected, expected_states = run(make(value, window=5), values)
    assert limits.dtype == jnp.float32
    np.testing.assert_allclose(limits, expected, rtol=ROUNDING)
    chex.assert_trees_all_equal(states, expected_states)


SOME_VALUES = st.one_of(
    st.floats(width=32),
    st.sampled_from([np.nan, np.inf, 0.0, 1e-45, 1e-38, 1.0, 1.5, 1e19, 3e38, 3.4e38]),
)


OF_TWO = thresholds.window_zscore(0.1, window=2)


@jax.jit
def follow_every(values):
    return {
        name: follow(each, values)
        for name, each in (EVERY | {"of two": OF_TWO}).items()
    }


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(values=st.lists(SOME_VALUES, min_size=16, max_size=16))
def test_no_stream_makes_a_state_infinite_or_a_limit_nan(values):
    for limits, states in follow_every(np.array(values, np.float32)).values():
        chex.assert_tree_all_finite(states)
        assert (np.asarray(limits) >= 0).all()  # NaN would not be


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "value", "error", "remedy"),
    [
        (thresholds.window_zscore, "num_sigmas", 0.0, ValueError, "6 is usual"),
        (thresholds.window_zscore, "num_sigmas", -1, ValueError, "6 is usual"),
        (thresholds.window_zscore, "num_sigmas", np.inf, ValueError, "6 is usual"),
        (thresholds.window_zscore, "num_sigmas", np.nan, ValueError, "6 is usual"),
        (thresholds.window_zscore, "num_sigmas", "6", TypeError, "must be a number"),
        (thresholds.window_quantile, "q", 0.0, ValueError, "percentile 10"),
        (thresholds.window_quantile, "q", 10, ValueError, "percentile 10"),
        (thresholds.window_quantile, "q", None, TypeError, "must be a number"),
        (thresholds.window_median, "ratio", 0.0, ValueError, "20 detects spikes"),
        (thresholds.window_median, "ratio", np.inf, ValueError, "20 detects spikes"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(
    make, name, value, error, remedy
):
    with pytest.raises(error) as raised:
        make(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)


MAKERS = {
    "zscore": thresholds.window_zscore,
    "quantile": functools.partial(thresholds.window_quantile, 0.9),
    "median": functools.partial(thresholds.window_median, 3.0),
}


@pytest.mark.parametrize("window", [0, 1, -4, 2.0, 128.5])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_window_of_less_than_two_or_no_integer_raises(make, window):
    with pytest.raises(ValueError, match="integer of at least 2") as raised:
        make(window=window)
    assert f"window={window!r}" in str(raised.value)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_traced_window_raises_and_names_the_remedy(make):
    with pytest.raises(TypeError, match=r"window .* static_args='window'"):
        jax.jit(lambda window: make(window=window).init())(8)
