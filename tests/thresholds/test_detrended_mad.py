"""Distance from the trend: the rule, falls, sizes, and what a lasting rise costs."""

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
# Logarithms below 8 are rounded by 2.4e-7; a distance is of four of them, a spread is
# 1.5 and a margin 6 times that.
RTOL = 2e-5

NORMS = thresholds.detrended_mad(5.0, floor=5.0)
LOSSES = thresholds.detrended_mad(6.0, floor=0.5, log=False)
QUICK_NORMS = thresholds.detrended_mad(5.0, floor=1.2, centre=3, window=4, arm=3)
QUICK_LOSSES = thresholds.detrended_mad(
    5.0, floor=0.1, centre=3, window=4, arm=3, log=False
)
FALLING = {
    True: thresholds.detrended_mad(5.0, floor=1.3),
    False: thresholds.detrended_mad(5.0, floor=0.26, log=False),
}
RELEARN = thresholds.relearn(NORMS, after=3)
EVERY = {
    "norms": QUICK_NORMS,
    "losses": QUICK_LOSSES,
    "relearn norms": thresholds.relearn(QUICK_NORMS, after=2),
    "relearn losses": thresholds.relearn(QUICK_LOSSES, after=2),
}


def margin_of(residuals, num_mads, floor, most=np.inf):
    residuals = np.asarray(residuals)
    spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    return min(max(num_mads * spread, floor), most)


def reference(
    values, num_mads=6.0, *, floor, centre=8, window=32, arm=24, log=True, armed=True
):
    """The limits by the rule in the docstring, in float64."""
    past, residuals, limits = [], [], []
    floor = np.log(floor) if log else floor
    for x in np.asarray(values, np.float64):
        limit = np.inf
        if past:
            middle = np.median(past[-centre:])
            if len(past) >= arm:
                most = 4 * floor if log else np.inf
                limit = middle + margin_of(residuals[-window:], num_mads, floor, most)
            elif log:
                limit = middle + 2 * floor
        limits.append(np.exp(limit) if log else limit)
        if not np.isfinite(x) or (log and x <= 0):
            continue
        learned = min(np.log(x) if log else x, limit)
        if past:
            residuals.append(learned - middle)
        past.append(learned)
    return np.array(limits)


def next_limit(threshold, state):
    return float(compiled(threshold.update)(np.float32(1.0), state)[0])


# --- the rule --------------------------------------------------------------------


SETTINGS = [
    {"floor": 5.0},
    {"num_mads": 3.0, "floor": 1.2},
    {"floor": 1.5, "centre": 1, "window": 2, "arm": 2},
    {"num_mads": 4.0, "floor": 1.3, "centre": 5, "window": 7, "arm": 30},
    {"floor": 1.5, "centre": 9, "window": 12, "arm": 4},
    {"floor": 0.5, "log": False},
    {"num_mads": 3.0, "floor": 0.01, "log": False},
    {"floor": 0.1, "centre": 3, "window": 6, "arm": 5, "log": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_follows_the_rule_over_hundreds_of_noisy_values(settings):
    values = noisy(300, seed=1, spikes=0.05)
    if not settings.get("log", True):
        values = np.float32(5 - np.arange(300) / 50) + 0.2 * np.log(values)
    limits, states = run(thresholds.detrended_mad(**settings), values)

    expected = reference(values, **settings)
    np.testing.assert_allclose(limits, expected, rtol=RTOL, atol=RTOL)
    np.testing.assert_array_equal(states.step, np.arange(1, 301))
    assert 5 < (values > limits).sum() < 150


def test_worked_by_hand():
    threshold = thresholds.detrended_mad(
        2.0, floor=0.5, centre=2, window=3, arm=3, log=False
    )
    limits, states = run(threshold, [2.0, 4.0, 3.0, 9.0, 5.0, 1.0])
    # Residuals 2, 0 about 1: distances 1, 1; centre 3.5. Learned 3.5 + 2·1.4826 for 9.
    # Residuals 2, 0, 2.9652 about 2: 0.9652; centre 4.7326. Learned 5 as it is.
    # Residuals 0, 2.9652, 0.2674 about 0.2674: 0.2674.
    margins = [2 * 1.4826 * each for each in (1, 0.9652, 0.2674)]
    learned = 3.5 + margins[0]
    expected = [3.5 + margins[0], (3 + learned) / 2 + margins[1]]
    expected += [(learned + 5) / 2 + margins[2]]
    np.testing.assert_array_equal(limits[:3], np.inf)
    np.testing.assert_allclose(limits[3:], expected, rtol=1e-4)
    assert states.values[3][-1] == pytest.approx(learned, rel=ROUNDING)


def test_the_defaults_are_those_of_the_signature():
    def computation(threshold):
        state = jax.eval_shape(threshold.init)
        return str(jax.make_jaxpr(threshold.update)(1.0, state))

    written_out = thresholds.detrended_mad(
        6.0, floor=2.0, centre=8, window=32, arm=24, log=True
    )
    defaults = thresholds.detrended_mad(floor=2.0)
    assert computation(defaults) == computation(written_out)


@pytest.mark.parametrize("log", [True, False])
def test_until_armed_the_limit_is_that_of_the_warm_up(log):
    threshold = thresholds.detrended_mad(floor=5.0, log=log)
    limits, _ = run(threshold, [3.0] * 26)
    expected = 3.0 * 25 if log else np.inf
    assert limits[0] == np.inf
    np.testing.assert_allclose(limits[1:24], expected, rtol=RTOL)
    np.testing.assert_allclose(limits[24:], 15.0 if log else 8.0, rtol=RTOL)


@pytest.mark.parametrize("step", [1, 2, 10, 23])
def test_a_gradient_of_1e30_in_the_warm_up_does_not_pass(step):
    values = noisy(60)
    clean = values.copy()
    values[step] = 1e30
    limits, _ = run(NORMS, values)
    assert limits[step] < 25 * 2.5  # times the centre
    # Nor does it leave a trace: one rank of 23 normal values.
    expected, _ = run(NORMS, clean)
    np.testing.assert_allclose(limits[30:], expected[30:], rtol=0.5)


def test_the_very_first_value_is_normal_whatever_it_is():
    for value in (1e-30, 1e30):
        limits, _ = run(NORMS, [value, 1.0])
        assert limits[0] == np.inf
        np.testing.assert_allclose(limits[1], 25 * np.float64(value), rtol=1e-4)


@pytest.mark.parametrize("threshold", [QUICK_NORMS, QUICK_LOSSES])
def test_the_limit_comes_from_the_past_alone(threshold):
    state = last(run(threshold, noisy(12))[1])
    low, high = (run(threshold, [x], state)[0] for x in (1e-30, 1e30))
    assert low == high


# --- guarantees ------------------------------------------------------------------


@pytest.mark.parametrize("log", [True, False])
def test_a_value_above_the_limit_is_learned_as_the_limit(log):
    threshold = QUICK_NORMS if log else QUICK_LOSSES
    state = last(run(threshold, noisy(12))[1])
    limit = next_limit(threshold, state)
    learned = [
        compiled(threshold.update)(np.float32(x), state)[1]
        for x in (limit * 1.01, limit * 1000, 3e38)
    ]
    chex.assert_trees_all_equal(learned[0], learned[1], learned[2])
    found = float(learned[0].values[-1])
    assert found == pytest.approx(np.log(limit) if log else limit, abs=ROUNDING)
    # Just below the limit a value is learned as it is.
    x = np.float32(limit * 0.99)
    found = compiled(threshold.update)(x, state)[1].values[-1]
    assert float(found) == pytest.approx(np.log(x) if log else x, abs=ROUNDING)


@full
def test_one_value_of_any_size_shifts_the_medians_by_one_rank():
    # The odd sizes have one middle; a large num_mads lets the outlier in unclipped.
    threshold = thresholds.detrended_mad(
        1e4, floor=1e-6, centre=9, window=33, arm=24, log=False
    )
    for seed in range(20):
        state = last(run(threshold, noisy(60, seed=seed))[1])
        values, residuals = np.sort(state.values), np.sort(state.residuals)
        middle = residuals[16]
        distances = np.sort(np.abs(residuals - middle))
        moved = max(residuals[17] - middle, middle - residuals[15])
        for size in (10.0, 1e3, -1e3, 1e30, -1e30):
            after = compiled(threshold.update)(np.float32(size), state)[1]
            centre = np.median(after.values)
            assert values[3] <= centre <= values[5]
            margin = next_limit(threshold, after) - centre
            low = max(0, distances[15] - moved)
            high = distances[17] + moved
            assert 1.4826e4 * low * 0.999 <= margin <= 1.4826e4 * high * 1.001


@pytest.mark.parametrize("log", [True, False], ids=["exponential", "linear"])
@pytest.mark.parametrize("slope", [0.025, 0.1, 1.0], ids="{} a value".format)
def test_a_stream_that_falls_steadily_is_judged_as_one_that_stands_still(slope, log):
    # The margin about a fall from 0 at noise 0.1, against that of the noise alone. The
    # floor is half of it, that of the warm-up (twice as much) about it.
    threshold = FALLING[log]
    noise = 0.1 * np.random.default_rng(0).standard_normal((20, 80))
    falling = noise - slope * np.arange(80)

    def margins(streams):
        streams = np.exp(streams) if log else streams
        limits, states = together(threshold)(streams.astype(np.float32))
        limits = np.log(limits) if log else np.asarray(limits)
        centres = np.median(states.values, axis=-1)
        return limits[:, 40:] - centres[:, 39:-1]

    # In a steep fall the centre is the mean of two values, not the median of eight:
    # its variance is 1/2 of that of the noise, not 1/5; that of the distance 1.5, not
    # 1.2, the square of 1.12. The rest is scatter of 20 streams.
    ratio = margins(falling).mean() / margins(noise).mean()
    assert 0.9 < ratio < 1.3


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_about_a_straight_fall_the_margin_is_the_floor(slope):
    limits, _ = run(LOSSES, 20 - slope * np.arange(80))
    centres = 20 - slope * (np.arange(80) - 4.5)
    np.testing.assert_allclose((limits - centres)[30:], 0.5, rtol=1e-3)


@pytest.mark.parametrize("jitter", [0.0, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("level", [1e-20, 4.0, 1e20])
def test_a_constant_stream_and_the_jitter_of_rounding_are_normal(level, jitter):
    rng = np.random.default_rng(0)
    values = np.float32(level * (1 + jitter * rng.standard_normal(100)))
    limits, _ = run(NORMS, values)
    assert (values <= limits).all()
    np.testing.assert_allclose(limits[24:], 5 * level, rtol=1e-4)
    if level == 4:
        limits, _ = run(LOSSES, values)
        assert (values <= limits).all()
        np.testing.assert_allclose(limits[24:], 4.5, rtol=1e-4)


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_value_that_cannot_be_learned_is_not_learned_at_any_step(threshold):
    good = noisy(12)
    norms = threshold in (QUICK_NORMS, EVERY["relearn norms"])
    bad = [np.nan, np.inf, -np.inf, *([0.0, -1.0] if norms else [])]
    limits, states = run(threshold, np.concatenate([[*bad, x] for x in good]))

    expected_limits, expected = run(threshold, good)
    found = limits.reshape(12, -1)
    np.testing.assert_array_equal(found[:, -1], expected_limits)
    np.testing.assert_array_equal(found, np.tile(found[:, -1:], found.shape[1]))
    after_good = jax.tree.map(lambda x: x[len(bad) :: len(bad) + 1], states)
    inner, expected = (getattr(each, "inner", each) for each in (after_good, expected))
    chex.assert_trees_all_equal(inner, expected)


# --- edge cases ------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "abnormal"), [(10.0, 4), (50.0, 9), (1e4, 16)])
def test_how_many_values_of_a_lasting_rise_are_abnormal(factor, abnormal):
    streams = 1 + 0.05 * np.random.default_rng(0).standard_normal((20, 100))
    streams[0] = 1.0
    streams[:, 60:] *= factor
    streams = streams.astype(np.float32)
    above = (streams > np.asarray(together(NORMS)(streams)[0]))[:, 60:]
    assert above[:, :abnormal].all()
    assert not above[:, abnormal:].any()


def test_losses_may_be_negative_and_zero():
    values = np.linspace(3, -3, 61)
    limits, states = run(LOSSES, values)
    assert states.step[-1] == 61
    np.testing.assert_allclose(states.values[-1], values[-8:], atol=ROUNDING)
    # The centre lags by 4.5 values of 0.1.
    np.testing.assert_allclose(limits[30:], values[30:] + 0.45 + 0.5, atol=1e-5)


def test_moving_the_losses_moves_the_limits():
    values = noisy(60, spikes=0.1)
    limits, _ = run(LOSSES, values)
    moved, _ = run(LOSSES, values - 7)
    np.testing.assert_allclose(moved, limits - 7, atol=RTOL * 10)


def test_scaling_the_norms_scales_the_limits():
    values = noisy(60, spikes=0.1)
    limits, _ = run(NORMS, values)
    scaled, _ = run(NORMS, values * np.float32(1e6))
    np.testing.assert_allclose(scaled, limits * 1e6, rtol=1e-4)


# --- rebase ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 9, 40])
@pytest.mark.parametrize("level", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("log", [True, False])
def test_rebase_puts_the_centre_there_and_keeps_the_spread(log, level, steps):
    threshold = QUICK_NORMS if log else QUICK_LOSSES
    state = last(run(threshold, noisy(steps))[1])
    rebased = compiled(threshold.rebase)(level, state)

    chex.assert_trees_all_equal(rebased.residuals, state.residuals)
    assert rebased.step == state.step
    place = np.log(level) if log else level
    np.testing.assert_allclose(rebased.values, place, rtol=ROUNDING, atol=ROUNDING)
    limits = [next_limit(threshold, each) for each in (state, rebased)]
    limits = np.log(limits) if log else np.array(limits)
    centre = np.median(state.values[-steps:])
    if np.isfinite(limits).all():
        assert limits[1] - place == pytest.approx(limits[0] - centre, rel=1e-4)
    assert np.isfinite(limits).all() == (log or steps >= 3)


def test_rebase_of_a_fresh_threshold_is_a_first_value():
    rebased = compiled(NORMS.rebase)(7.0, NORMS.init())
    assert rebased.step == 1
    assert next_limit(NORMS, rebased) == pytest.approx(7 * 25, rel=RTOL)
    # What follows is judged as after the first value 7.
    values = noisy(60, level=7.0)
    limits, _ = run(NORMS, values, rebased)
    expected, _ = run(NORMS, np.concatenate([[7.0] * 8, values]))
    assert (values <= limits).all()
    np.testing.assert_allclose(limits[-1], expected[-1], rtol=RTOL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_rebase_to_what_cannot_be_learned_changes_nothing(bad):
    threshold = QUICK_NORMS if bad in (0.0, -1.0) else QUICK_LOSSES
    for state in (threshold.init(), last(run(threshold, noisy(9))[1])):
        chex.assert_trees_all_equal(compiled(threshold.rebase)(bad, state), state)


@pytest.mark.parametrize(("factor", "abnormal"), [(10.0, 3), (50.0, 3), (1e3, 6)])
def test_relearn_accepts_a_level_shift_within_a_row_per_factor(factor, abnormal):
    # The limit is 5 and ten times that is accepted at once.
    streams = 1 + 0.01 * np.random.default_rng(0).standard_normal((5, 100))
    streams[:, 60:] *= factor
    streams = streams.astype(np.float32)
    above = (streams > np.asarray(together(RELEARN)(streams)[0]))[:, 60:]
    assert above[:, :abnormal].all()
    assert not above[:, abnormal:].any()


def test_relearn_accepts_a_rise_of_negative_losses_at_once():
    threshold = thresholds.relearn(LOSSES, after=2)
    values = np.where(np.arange(60) < 40, -100.0, -3.0)
    limits, _ = run(threshold, values)
    np.testing.assert_array_equal(np.flatnonzero(values > limits), [40, 41])


# --- any value, any caller -------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [[1.2e-38] * 9, [3e38] * 9, [1.2e-38] * 5 + [3e38] * 9, [3e38] * 5 + [1.2e-38] * 9],
    ids=["tiny", "huge", "tiny, then huge", "huge, then tiny"],
)
@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_extreme_values_keep_the_state_finite_and_the_limit_a_number(threshold, values):
    limits, states = run(threshold, values)
    chex.assert_tree_all_finite(states)
    assert not np.isnan(limits).any()
    assert limits[-1] > 0


@pytest.mark.parametrize(
    "values",
    [[-3e38], [-1e32, -1e32, -1e32], [3e38] * 9 + [-3e38] * 9, [3e38, -3e38] * 9],
    ids=["first", "first of many", "a fall", "in turn"],
)
def test_losses_of_any_sign_and_size_keep_the_state_finite(values):
    threshold = thresholds.detrended_mad(floor=0.5, window=4, arm=3, log=False)
    limits, states = run(threshold, values)
    assert not np.isnan(limits).any()
    chex.assert_tree_all_finite(states)


NORM_VALUES = st.one_of(
    st.floats(width=32),
    st.sampled_from([np.nan, np.inf, 0.0, 1e-45, 1e-38, 1.0, 1.5, 1e19, 3e38, 3.4e38]),
)
LOSS_VALUES = st.one_of(
    st.floats(min_value=-(2.0**90), max_value=2.0**90, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1e-45, 1e-38, 1.0, -1.5, 1e19]),
)


@jax.jit
def follow_every(norms, losses):
    return {
        name: follow(each, losses if "losses" in name else norms)
        for name, each in EVERY.items()
    }


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(
    norms=st.lists(NORM_VALUES, min_size=16, max_size=16),
    losses=st.lists(LOSS_VALUES, min_size=16, max_size=16),
)
@full
def test_no_stream_makes_a_state_infinite_or_a_limit_nan(norms, losses):
    found = follow_every(np.array(norms, np.float32), np.array(losses, np.float32))
    for limits, states in found.values():
        chex.assert_tree_all_finite(states)
        assert not np.isnan(limits).any()


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
@quick_only("norms")
def test_a_scan_over_fifty_streams_equals_fifty_loops(threshold):
    streams = np.stack([noisy(14, seed=s, spikes=0.1) for s in range(50)])
    streams[0, 7], streams[1, 0], streams[2, 10] = np.nan, np.inf, 0.0
    found = jax.tree.map(np.asarray, together(threshold)(streams))
    for i, stream in enumerate(streams):
        limits, states = jax.tree.map(lambda x, i=i: x[i], found)
        expected_limits, expected = run(threshold, stream)
        np.testing.assert_allclose(limits, expected_limits, rtol=RTOL)
        chex.assert_trees_all_close(states, expected, rtol=RTOL, atol=ROUNDING)


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


def test_the_state_is_a_count_the_centre_and_the_window():
    assert signature(NORMS.init()) == thresholds.DetrendedMadState(
        ((), "int32", False), ((8,), "float32", False), ((32,), "float32", False)
    )


@pytest.mark.parametrize("log", [True, False])
def test_traced_hyperparameters_equal_static_ones(log):
    values, static = noisy(30, spikes=0.1), QUICK_NORMS if log else QUICK_LOSSES
    sizes = {"centre": 3, "window": 4, "log": log}

    @jax.jit
    def traced(values, num_mads, floor, arm):
        threshold = thresholds.detrended_mad(num_mads, floor=floor, arm=arm, **sizes)
        return follow(threshold, values)

    floor = jnp.float32(1.2 if log else 0.1)
    limits, states = traced(values, jnp.bfloat16(5.0), floor, 3)
    expected, expected_states = run(static, values)
    assert limits.dtype == states.values.dtype == jnp.float32
    np.testing.assert_allclose(limits, expected, rtol=RTOL)
    chex.assert_trees_all_close(states, expected_states, rtol=RTOL, atol=ROUNDING)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "remedy"),
    [
        ("num_mads", 0.0, ValueError, "5 and 6 are usual"),
        ("num_mads", np.inf, ValueError, "5 and 6 are usual"),
        ("num_mads", "6", TypeError, "must be a number"),
        ("floor", 1.0, ValueError, "5 is five times the centre"),
        ("floor", 0.5, ValueError, "5 is five times the centre"),
        ("floor", np.nan, ValueError, "5 is five times the centre"),
        ("floor", None, TypeError, "must be a number"),
        ("centre", 0, ValueError, "size of an array"),
        ("centre", 2.0, ValueError, "size of an array"),
        ("window", 1, ValueError, "size of an array"),
        ("window", 32.5, ValueError, "size of an array"),
        ("arm", 1, ValueError, "24 is the default"),
        ("arm", 2.5, ValueError, "24 is the default"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(
    name, value, error, remedy
):
    with pytest.raises(error) as raised:
        thresholds.detrended_mad(**({"floor": 5.0} | {name: value}))
    assert f"{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize("floor", [0.0, -0.5, np.inf])
def test_the_floor_of_a_loss_is_a_distance(floor):
    with pytest.raises(ValueError, match=r"0\.5 is half a nat") as raised:
        thresholds.detrended_mad(floor=floor, log=False)
    assert f"floor={floor!r}" in str(raised.value)
    thresholds.detrended_mad(floor=0.5, log=False)


def test_the_floor_has_no_default():
    with pytest.raises(TypeError, match="floor"):
        thresholds.detrended_mad(6.0)


@pytest.mark.parametrize("name", ["centre", "window"])
def test_a_traced_size_raises_and_names_the_remedy(name):
    def init(size):
        return thresholds.detrended_mad(floor=5.0, **{name: size}).init()

    with pytest.raises(TypeError, match=f"{name} .* static_args='{name}'"):
        jax.jit(init)(8)
