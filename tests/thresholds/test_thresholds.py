"""Thresholds: the published rule, what is never learned, and the way out of it."""

import inspect
import re

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import compiled, last, noisy, run, signature
from tiers import full

import optax_stability as ost
from optax_stability import thresholds

# One rounding of the mean is 6e-8 of it and is remembered for 1/(1 − 0.97) = 33 steps:
# 2e-6 of the mean, 2e-5 of a deviation that is a tenth of the mean.
RTOL = 2e-5
# A product of a few float32 roundings.
ROUNDING = 1e-6

MODES = ("adaptive", "mean", "max")
ZSCORE = {mode: thresholds.zscore(mode=mode) for mode in MODES}
QUICK = {mode: thresholds.zscore(warmup=3, mode=mode) for mode in MODES}
RELEARN = {mode: thresholds.relearn(ZSCORE[mode], after=25) for mode in MODES}
QUICK_RELEARN = thresholds.relearn(QUICK["adaptive"], after=3)
COUNTING = thresholds.relearn(thresholds.constant(5.0), after=4)
EVERY = {
    "constant": thresholds.constant(1.0),
    **QUICK,
    "relearn": QUICK_RELEARN,
}
NOT_A_LEVEL = (np.nan, np.inf, 0.0)


class ReferenceZClip:
    """ZClip in float64, from the equations of arXiv:2504.02507."""

    def __init__(self, z_max=2.5, decay=0.97, warmup=25, mode="adaptive"):
        self.z_max, self.decay, self.warmup, self.mode = z_max, decay, warmup, mode
        self.first, self.mean, self.variance = [], 0.0, 0.0

    def __call__(self, x):
        if len(self.first) < self.warmup:
            self.first.append(x)
            self.mean, self.variance = np.mean(self.first), np.var(self.first)
            return np.inf
        mean, std, z_max = self.mean, np.sqrt(self.variance), self.z_max
        z = (x - mean) / std
        limit = mean + z_max * std
        if z > z_max:
            limit = {
                "adaptive": mean + z_max**2 / z * std,
                "mean": mean,
                "max": mean + z_max * std,
            }[self.mode]
        learned = limit if z > z_max else x
        self.mean = self.decay * mean + (1 - self.decay) * learned
        self.variance = (
            self.decay * self.variance + (1 - self.decay) * (learned - self.mean) ** 2
        )
        return limit


# --- zscore: the rule ------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"z_max": 2.0, "decay": 0.9, "warmup": 5}],
    ids=["published defaults", "README's strict setting"],
)
def test_zscore_follows_the_paper_over_hundreds_of_noisy_steps(settings, mode):
    values = noisy(500, seed=1, spikes=0.03)
    reference = ReferenceZClip(mode=mode, **settings)
    expected = np.array(
        [(reference(x), reference.mean, reference.variance) for x in values.tolist()]
    )

    limits, states = run(thresholds.zscore(mode=mode, **settings), values)

    np.testing.assert_allclose(limits, expected[:, 0], rtol=RTOL)
    np.testing.assert_allclose(states.mean, expected[:, 1], rtol=RTOL)
    np.testing.assert_allclose(states.std, np.sqrt(expected[:, 2]), rtol=RTOL)
    np.testing.assert_array_equal(states.step, np.arange(1, 501))
    assert 15 < (values > limits).sum() < 300  # both branches were taken, many times


@pytest.mark.parametrize(
    ("mode", "limit_of_the_spike", "next_limit"),
    [
        # μ, σ = 2, 1 after the warm-up; z = 8; limit 2 + 2²·1/8.
        # Then μ = 2.25 and σ² = ½ + ½·0.25².
        ("adaptive", 2.5, 2.25 + 2 * np.sqrt(0.53125)),
        # Learned 2: μ = 2, σ² = ½.
        ("mean", 2.0, 2.0 + 2 * np.sqrt(0.5)),
        # Learned 4: μ = 3, σ² = ½ + ½·1² with the mean already moved.
        ("max", 4.0, 5.0),
    ],
)
def test_zscore_worked_by_hand(mode, limit_of_the_spike, next_limit):
    threshold = thresholds.zscore(2.0, decay=0.5, warmup=2, mode=mode)
    limits, _ = run(threshold, [1.0, 3.0, 10.0, 1.0])
    expected = [np.inf, np.inf, limit_of_the_spike, next_limit]
    np.testing.assert_allclose(limits, expected, rtol=ROUNDING)


def test_zscore_defaults_are_the_published_ones():
    values = noisy(100, spikes=0.05)
    published = thresholds.zscore(2.5, decay=0.97, warmup=25, mode="adaptive")
    chex.assert_trees_all_equal(
        run(thresholds.zscore(), values), run(published, values)
    )


def test_the_limit_of_a_normal_value_does_not_depend_on_it():
    _, states = run(ZSCORE["adaptive"], noisy(40))
    state = last(states)
    low, _ = run(ZSCORE["adaptive"], [0.5 * state.mean], state)
    high, _ = run(ZSCORE["adaptive"], [state.mean + 2.4 * state.std], state)
    assert low == high


@pytest.mark.parametrize("exponent", [-60, -1, 1, 60])
@pytest.mark.parametrize(
    "threshold",
    [*ZSCORE.values(), QUICK_RELEARN],
    ids=[*MODES, "relearn"],
)
def test_a_power_of_two_scales_every_limit_bit_for_bit(threshold, exponent):
    values = np.concatenate([noisy(60, spikes=0.05), noisy(40, level=20.0)])
    factor = np.float32(2.0**exponent)
    limits, _ = run(threshold, values)
    scaled, _ = run(threshold, values * factor)
    np.testing.assert_array_equal(scaled, limits * factor)


# --- zscore: what is never learned -----------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [*NOT_A_LEVEL, -np.inf])
def test_a_value_that_is_no_level_is_not_learned_at_any_step(bad, mode):
    state = QUICK[mode].init()
    for x in noisy(8):  # step 0, the warm-up, its last step, and armed ones
        _, after_bad = run(QUICK[mode], [bad], state)
        chex.assert_trees_all_equal(last(after_bad), state)
        state = last(run(QUICK[mode], [x], state)[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_not_normal_once_armed(bad):
    limits, _ = run(QUICK["adaptive"], [1.0, 1.5, 1.2, 1.3, bad])
    assert np.isfinite(limits[-1])
    assert not bad <= limits[-1]


SOME_VALUES = st.one_of(
    st.floats(min_value=0.0, width=32, allow_infinity=True),
    st.sampled_from([np.nan, np.inf, 0.0, 1e-45, 1e-38, 1.0, 1.5, 1e19, 3e38, 3.4e38]),
)
SHORT = [
    *QUICK.values(),
    QUICK_RELEARN,
    thresholds.relearn(thresholds.zscore(0.25, decay=0.5, warmup=1), after=1),
]


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(values=st.lists(SOME_VALUES, min_size=16, max_size=16))
@full
def test_no_stream_makes_a_state_infinite_or_a_limit_nan(values):
    for threshold in SHORT:
        limits, states = run(threshold, values)
        chex.assert_tree_all_finite(states)
        assert (limits >= 0).all()  # NaN would not be


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_stream_is_never_above_its_limit(mode):
    levels = 10.0 ** np.random.default_rng(0).uniform(-37.0, 38.0, 2000)
    levels = levels.astype(np.float32)
    update = jax.jit(jax.vmap(QUICK[mode].update))
    states = jax.vmap(lambda _: QUICK[mode].init())(levels)
    for _ in range(60):
        limits, states = update(levels, states)
        assert (np.asarray(limits) >= levels).all()


@pytest.mark.parametrize("level", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("mode", MODES)
def test_the_rounding_of_a_constant_stream_is_normal(mode, level):
    level = np.float32(level)
    next_above = np.nextafter(level, np.float32(np.inf))
    limits, _ = run(QUICK[mode], [level] * 30 + [next_above])
    assert next_above <= limits[-1]


@pytest.mark.parametrize("size", [1.0, 3.0, 10.0, 1e6, 1e38])
@pytest.mark.parametrize("mode", MODES)
def test_one_outlier_moves_the_mean_by_at_most_its_share_of_the_limit(mode, size):
    before = last(run(ZSCORE[mode], noisy(60))[1])
    _, states = run(ZSCORE[mode], [before.mean + np.float32(size) * before.std], before)
    bound = (1 - 0.97) * 2.5 * float(before.std)
    moved = float(states.mean[0]) - float(before.mean)
    rounding_of_two_means = ROUNDING * float(before.mean)
    assert 0 <= moved <= bound + rounding_of_two_means
    if mode == "max" and size > 2.5:
        assert moved == pytest.approx(bound, abs=rounding_of_two_means)


def test_in_the_published_warm_up_an_outlier_is_learned_raw():
    threshold = thresholds.zscore(warmup=3, published=True)
    limits, states = run(threshold, [1.0, 1.0, 1e6, 1.0])
    assert float(states.mean[2]) == pytest.approx(np.mean([1, 1, 1e6]), rel=RTOL)
    assert limits[3] > 1e6


# --- rebase ----------------------------------------------------------------------


@pytest.mark.parametrize("z_max", [0.5, 2.5])
def test_rebase_starts_again_with_a_limit_of_twice_the_level(z_max):
    threshold = thresholds.zscore(z_max, warmup=3)
    warming_up, armed = (last(run(threshold, noisy(steps))[1]) for steps in (2, 20))
    for state in (threshold.init(), warming_up, armed):
        rebased = compiled(threshold.rebase)(7.0, state)
        limits, _ = run(threshold, [7.0], rebased)
        assert limits[0] == pytest.approx(14.0, rel=ROUNDING)
        assert float(rebased.mean) == 7.0
        assert float(rebased.std) == pytest.approx(7.0 / z_max, rel=ROUNDING)


@pytest.mark.parametrize("bad", NOT_A_LEVEL)
def test_rebase_to_what_is_no_level_changes_nothing(bad):
    threshold = QUICK["adaptive"]
    for state in (threshold.init(), last(run(threshold, noisy(10))[1])):
        chex.assert_trees_all_equal(compiled(threshold.rebase)(bad, state), state)


@pytest.mark.parametrize("z_max", [0.25, 2.5])
def test_rebase_to_the_largest_norms_keeps_the_state_finite(z_max):
    threshold = thresholds.zscore(z_max)
    chex.assert_tree_all_finite(threshold.rebase(3e38, threshold.init()))


# --- relearn ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["adaptive", "mean"])
def test_the_published_rule_never_accepts_a_level_shift(mode):
    before, after = noisy(100), 10 * noisy(300, seed=1)
    limits, _ = run(ZSCORE[mode], np.concatenate([before, after]))
    assert (after > limits[100:]).all()
    assert limits[-1] < 3 * before.max()


def test_the_published_mode_max_follows_a_level_shift_slowly():
    # Learning μ + z_max·σ multiplies σ² by d + (1−d)·d²·z_max² = 1.15 per value.
    before, after = noisy(100), 10 * noisy(100, seed=1)
    limits, _ = run(ZSCORE["max"], np.concatenate([before, after]))
    assert (after > limits[100:])[:5].all()
    assert not (after > limits[100:])[-20:].all()


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 1), (10.0, 2), (1e6, 3)])
@pytest.mark.parametrize("mode", ["adaptive", "mean"])
def test_relearn_accepts_a_level_shift_row_by_row(mode, factor, rows):
    before = noisy(60)
    # Five times the level at least, ten times the limit at most: one row.
    shifted = factor * np.random.default_rng(1).uniform(5.0, 8.0, 180).astype("f4")
    limits, states = run(RELEARN[mode], np.concatenate([before, shifted]))
    above = shifted > limits[60:]
    ends = 25 * rows
    assert above[:ends].all()
    assert not above[ends:].any()
    for end, rise in zip(range(25, ends + 1, 25), (10, 100, 10_000), strict=False):
        level = min(shifted[end - 1], rise * limits[59 + end])
        mean = float(states.inner.mean[59 + end])
        assert mean == pytest.approx(level, rel=ROUNDING)
        assert states.above[59 + end] == 0


def test_relearn_accepts_at_once_where_a_rise_has_no_bound_or_no_sign():
    unbounded = thresholds.relearn(QUICK["adaptive"], after=3, max_rise=np.inf)
    limits, _ = run(unbounded, [1.0, 1.1, 1.2, 1e6, 1e6, 1e6, 1e6])
    assert limits[-1] == pytest.approx(2e6, rel=ROUNDING)
    of_loss = thresholds.detrended_mad(6.0, floor=0.5, arm=2, log=False)
    falling_loss = [-9.0, -9.0, -9.0, -2.0, -2.0, -2.0]
    limits, _ = run(thresholds.relearn(of_loss, after=2), falling_loss)
    assert (limits[3:5] < -2.0).all()
    assert limits[5] >= -1.5


def test_until_a_row_is_full_relearn_is_the_wrapped_threshold():
    values = np.concatenate([noisy(60, spikes=0.05), 10 * noisy(25, seed=1)])
    alone_limits, alone = run(ZSCORE["adaptive"], values)
    limits, states = run(RELEARN["adaptive"], values)
    np.testing.assert_array_equal(limits, alone_limits)
    before_it_is_full = jax.tree.map(lambda x: x[:-1], (states.inner, alone))
    chex.assert_trees_all_equal(*before_it_is_full)


@pytest.mark.parametrize(
    ("values", "above"),
    [
        ([9.0, 9.0, 9.0], [1, 2, 3]),
        ([9.0, 9.0, 1.0, 9.0], [1, 2, 0, 1]),
        ([9.0, np.nan, 9.0], [1, 1, 2]),
        ([9.0, np.inf, 9.0], [1, 1, 2]),
        ([np.nan, np.inf, 9.0], [0, 0, 1]),
        ([9.0, 0.0, 9.0], [1, 0, 1]),
        ([9.0, 5.0, 9.0], [1, 0, 1]),
        ([9.0, 9.0, 9.0, 9.0, 9.0], [1, 2, 3, 0, 1]),
    ],
    ids=[
        "values above the limit count",
        "a normal value ends the row",
        "NaN neither counts nor ends it",
        "Inf neither counts nor ends it",
        "no row starts with a non-finite value",
        "a zero is normal",
        "the limit itself is normal",
        "a full row starts again",
    ],
)
def test_relearn_counts_values_in_a_row(values, above):
    np.testing.assert_array_equal(run(COUNTING, values)[1].above, above)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_relearn_never_rebases_to_a_value_that_is_not_finite(bad):
    values = [1.0, 1.1, 1.2, 9.0, 9.0, bad, bad, bad, 9.0, 9.0]
    limits, states = run(QUICK_RELEARN, values)
    chex.assert_tree_all_finite(states)
    np.testing.assert_array_equal(states.above, [0, 0, 0, 1, 2, 2, 2, 2, 0, 0])
    assert limits[-1] == pytest.approx(18.0, rel=ROUNDING)


def test_relearn_rebases_what_it_wraps_and_forgets_the_row():
    state = last(run(QUICK_RELEARN, [1.0, 1.1, 1.2, 9.0, 9.0])[1])
    assert int(state.above) == 2
    rebased = compiled(QUICK_RELEARN.rebase)(40.0, state)
    assert int(rebased.above) == 0
    assert run(QUICK_RELEARN, [40.0], rebased)[0] == pytest.approx(80.0, rel=ROUNDING)


# --- constant --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-30, 1, 2.5, np.inf])
def test_constant_is_constant_and_learns_nothing(limit):
    threshold = thresholds.constant(limit)
    state = threshold.init()
    for x in (0.0, 1.0, 1e38, np.nan):
        found, state = threshold.update(x, state)
        assert found == np.float32(limit)
    assert state == threshold.init() == threshold.rebase(3.0, ())


# --- every threshold -------------------------------------------------------------


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
    rebased = jax.eval_shape(threshold.rebase, x, state)
    assert signature(rebased) == signature(state)


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_scan_over_vmapped_streams_equals_a_loop_over_them(threshold):
    streams = np.stack(
        [noisy(40, seed=s, level=10.0 ** (3 * s), spikes=0.1) for s in range(4)]
    )
    streams[0, 7], streams[1, 0], streams[2, 20] = np.nan, np.inf, 0.0

    @jax.jit
    def together(x):
        def step(states, x):
            limits, states = jax.vmap(threshold.update)(x, states)
            return states, (limits, states)

        states = jax.vmap(lambda _: threshold.init())(x[0])
        return jax.lax.scan(step, states, x)[1]

    found = together(streams.T)
    for i, stream in enumerate(streams):
        limits, states = jax.tree.map(lambda x, i=i: np.asarray(x[:, i]), found)
        expected_limits, expected_states = run(threshold, stream)
        np.testing.assert_allclose(limits, expected_limits, rtol=ROUNDING)
        chex.assert_trees_all_close(states, expected_states, rtol=RTOL)


@pytest.mark.parametrize("mode", MODES)
def test_traced_hyperparameters_equal_static_ones(mode):
    @jax.jit
    def update(x, state, z_max, decay, warmup, after):
        inner = thresholds.zscore(z_max, decay=decay, warmup=warmup, mode=mode)
        return thresholds.relearn(inner, after=after).update(x, state)

    inner = thresholds.zscore(2.0, decay=0.9, warmup=7, mode=mode)
    static = thresholds.relearn(inner, after=3)
    values = np.concatenate([noisy(40, spikes=0.05), noisy(10, level=30.0)])
    state = static.init()
    for x, expected in zip(values, run(static, values)[0], strict=True):
        limit, state = update(x, state, 2.0, 0.9, 7, 3)
        assert float(limit) == pytest.approx(expected, rel=RTOL)


def test_a_traced_constant_equals_a_static_one():
    limit, _ = jax.jit(lambda limit: thresholds.constant(limit).update(3.0, ()))(0.5)
    chex.assert_trees_all_equal(limit, jnp.float32(0.5))


def test_bfloat16_hyperparameters_are_used_in_float32():
    values = noisy(60, spikes=0.05)
    z_max, decay = jnp.bfloat16(2.3), jnp.bfloat16(0.97)
    narrow = thresholds.zscore(z_max, decay=decay, warmup=7)
    wide = thresholds.zscore(float(z_max), decay=float(decay), warmup=7)
    limits, states = run(narrow, values)
    assert limits.dtype == states.mean.dtype == states.std.dtype == np.float32
    np.testing.assert_allclose(limits, run(wide, values)[0], rtol=RTOL)


def test_numpy_hyperparameters_do_not_widen_the_state():
    with jax.enable_x64(True):
        inner = thresholds.zscore(np.float64(2.5), decay=np.float64(0.97))
        threshold = thresholds.relearn(inner, after=2)
        state = jax.eval_shape(threshold.init)
        limit, updated = jax.eval_shape(threshold.update, np.float32(1.0), state)
    assert limit.dtype == jnp.float32
    assert signature(updated) == signature(state)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "value", "error", "remedy"),
    [
        (thresholds.constant, "limit", 0.0, ValueError, "such as 1.0"),
        (thresholds.constant, "limit", -1, ValueError, "such as 1.0"),
        (thresholds.constant, "limit", np.nan, ValueError, "such as 1.0"),
        (thresholds.constant, "limit", "one", TypeError, "must be a number"),
        (thresholds.zscore, "z_max", 0.0, ValueError, "2.5 is the published"),
        (thresholds.zscore, "z_max", np.inf, ValueError, "2.5 is the published"),
        (thresholds.zscore, "z_max", None, TypeError, "must be a number"),
        (thresholds.zscore, "decay", 1.0, ValueError, "0.97 averages"),
        (thresholds.zscore, "decay", -0.1, ValueError, "0.97 averages"),
        (thresholds.zscore, "decay", True, TypeError, "must be a number"),
        (thresholds.zscore, "warmup", 0, ValueError, "25 is the published"),
        (thresholds.zscore, "warmup", 2.5, ValueError, "25 is the published"),
        (thresholds.zscore, "mode", "median", ValueError, "'adaptive', 'mean', 'max'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(
    make, name, value, error, remedy
):
    with pytest.raises(error) as raised:
        make(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize("after", [0, -3, 2.5])
def test_relearn_needs_a_positive_count(after):
    with pytest.raises(ValueError, match="25 follows a change") as raised:
        thresholds.relearn(ZSCORE["adaptive"], after=after)
    assert f"after={after!r}" in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [{"z_max": 1e-3}, {"decay": 0}, {"warmup": 1}],
)
def test_the_ends_of_each_range_are_accepted(settings):
    limits, states = run(thresholds.zscore(**settings), noisy(40))
    chex.assert_tree_all_finite(states)
    assert np.isfinite(limits[-1])


@pytest.mark.parametrize("wrong", [3.0, None, thresholds.zscore])
def test_relearn_over_what_is_no_threshold_raises_by_name(wrong):
    with pytest.raises(TypeError, match=r"threshold must be a Threshold.*constant"):
        thresholds.relearn(wrong, after=5)


def test_the_greatest_rise_can_be_traced():
    values = [1.0, 1.1, 1.2, 9.0, 9.0, 9.0, 9.0]

    def limits(max_rise):
        threshold = thresholds.relearn(QUICK["adaptive"], after=3, max_rise=max_rise)
        state, found = threshold.init(), []
        for x in values:
            limit, state = threshold.update(x, state)
            found.append(limit)
        return jnp.stack(found)

    np.testing.assert_allclose(jax.jit(limits)(2.0), limits(2.0), rtol=ROUNDING)


# --- how a threshold prints --------------------------------------------------------

CALLS = (
    "constant(1.0)",
    "constant(limit=inf)",
    "zscore()",
    "zscore(2.0, decay=0.9, mode='max')",
    "ema_ratio(1.05, warmup=10)",
    "window_zscore(6.0, window=64)",
    "window_quantile(0.9)",
    "window_median(3.0)",
    "detrended_mad(5.0, floor=5.0)",
    "relearn(zscore(), after=25)",
    "at_most_median(zscore(), window=16)",
)


@pytest.mark.parametrize("call", CALLS)
def test_a_threshold_prints_as_the_call_that_made_it(call):
    assert repr(eval(call, {**vars(thresholds), "inf": np.inf})) == call


def test_every_function_that_makes_a_threshold_is_among_the_calls():
    made = {name for name, x in vars(thresholds).items() if inspect.isfunction(x)}
    assert made == {call.partition("(")[0] for call in CALLS}


def test_a_threshold_made_by_hand_prints_its_functions():
    functions = thresholds.zscore()[:3]
    by_hand = thresholds.Threshold(*functions)
    assert repr(by_hand) == "Threshold({!r}, {!r}, {!r})".format(*functions)


def test_the_signature_of_spike_guard_shows_its_thresholds_as_calls():
    signature = str(inspect.signature(ost.spike_guard))
    for name, call in {
        "grad_norm": "detrended_mad(5.0, floor=5.0)",
        "value": "detrended_mad(7.0, floor=0.5, log=False)",
        "confirm": "detrended_mad(4.0, floor=0.3, log=False)",
    }.items():
        assert re.search(rf", {name}: [^=]* = {re.escape(call)}, ", signature)


@pytest.mark.parametrize("what", ["update", "rebase"])
def test_outside_jit_it_is_one_program_compiled_once(what, caplog):
    threshold = thresholds.window_median(2.0, window=13)
    state, x = threshold.init(), jnp.float32(1.0)
    with jax.log_compiles():
        for _ in range(2):
            getattr(threshold, what)(x, state)
    assert caplog.text.count("Compiling jit(") == 1
