"""The ratio to an exponential mean: AdaGC's rule, its slowness, and the way out."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import compiled, follow, last, noisy, run, signature, together
from tiers import full

from optax_stability import thresholds

# A few float32 roundings.
ROUNDING = 1e-6
# A rounding of 6e-8 a step, remembered for 1/(1 − 0.98) = 50 steps.
RTOL = 5e-6

PUBLISHED = thresholds.ema_ratio()
QUICK = thresholds.ema_ratio(1.25, decay=0.5, warmup=3)
QUICK_RELEARN = thresholds.relearn(QUICK, after=4)
RELEARN = thresholds.relearn(PUBLISHED, after=25)
EVERY = {"ema_ratio": QUICK, "relearn": QUICK_RELEARN}
NOT_A_LEVEL = (np.nan, np.inf, -np.inf, 0.0, -1.0)


def reference(values, ratio=1.05, decay=0.98, warmup=100):
    """AdaGC for one tensor, from the equations of arXiv:2502.11034, in float64.

    The threshold's limit for a norm g is what the paper shortens it to: λ·γ.
    """
    gamma, limits, gammas = np.inf, [], []
    for t, g in enumerate(np.asarray(values, np.float64)):
        if t < warmup:
            limits.append(np.inf)
            gamma = min(gamma, g)
        else:
            limits.append(ratio * gamma)
            c = min(ratio * gamma / g, 1.0)
            gamma = decay * gamma + (1 - decay) * c * g
        gammas.append(gamma)
    return np.array(limits), np.array(gammas)


# --- the rule --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio": 1.5, "decay": 0.9, "warmup": 7},
        {"ratio": 2.0, "decay": 0.0, "warmup": 1},
        {"ratio": 0.9, "decay": 0.98, "warmup": 20},
    ],
    ids=["published defaults", "quick", "no memory", "ratio below one"],
)
def test_it_follows_the_paper_over_hundreds_of_noisy_values(settings):
    values = noisy(500, seed=1, spikes=0.03)
    limits, states = run(thresholds.ema_ratio(**settings), values)

    expected, levels = reference(values, **settings)
    np.testing.assert_allclose(limits, expected, rtol=RTOL)
    np.testing.assert_allclose(states.level, levels, rtol=RTOL)
    np.testing.assert_array_equal(states.step, np.arange(1, 501))
    warmup = settings.get("warmup", 100)
    assert np.isinf(limits[:warmup]).all()
    assert np.isfinite(limits[warmup:]).all()
    # In the warm-up too a spike was seen, and after it both branches were taken.
    assert (values[:warmup] > 0).all()
    assert 10 < (values > limits).sum() < 490


def test_worked_by_hand():
    threshold = thresholds.ema_ratio(2.0, decay=0.5, warmup=2)
    limits, states = run(threshold, [4.0, 3.0, 5.0, 20.0, 1.0, 1.0])
    # γ: 4, then the lesser 3; (3 + 5)/2; held to 8: (4 + 8)/2; (6 + 1)/2.
    np.testing.assert_array_equal(limits, [np.inf, np.inf, 6, 8, 12, 7])
    np.testing.assert_array_equal(states.level, [4, 3, 4, 6, 3.5, 2.25])


def test_the_warm_up_keeps_the_least_value_whenever_it_comes():
    for values in ([1.0, 5.0, 9.0], [9.0, 5.0, 1.0], [5.0, 1.0, 9.0]):
        limits, states = run(QUICK, [*values, 1.0])
        assert states.level[2] == 1
        assert limits[3] == np.float32(1.25)


def test_the_defaults_are_the_published_ones():
    def computation(threshold):
        state = jax.eval_shape(threshold.init)
        return str(jax.make_jaxpr(threshold.update)(1.0, state))

    published = thresholds.ema_ratio(1.05, decay=0.98, warmup=100)
    assert computation(PUBLISHED) == computation(published)


def test_the_limit_comes_from_the_past_alone():
    state = last(run(QUICK, noisy(12))[1])
    low, high = (run(QUICK, [x], state)[0] for x in (1e-30, 1e30))
    assert low == high


@pytest.mark.parametrize("exponent", [-60, -1, 1, 60])
@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_power_of_two_scales_every_limit_bit_for_bit(threshold, exponent):
    values = np.concatenate([noisy(60, spikes=0.05), noisy(40, level=20.0)])
    factor = np.float32(2.0**exponent)
    limits, _ = run(threshold, values)
    scaled, _ = run(threshold, values * factor)
    np.testing.assert_array_equal(scaled, limits * factor)


@pytest.mark.parametrize("level", [1e-30, 3.14159, 1e38])
def test_a_constant_stream_stays_constant(level):
    limits, states = run(PUBLISHED, [level] * 400)
    np.testing.assert_array_equal(states.level, np.float32(level))
    assert (limits >= np.float32(level)).all()


# --- what is never learned -------------------------------------------------------


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_value_that_is_no_level_neither_counts_nor_is_learned(threshold):
    good = noisy(12)
    rows = [[*NOT_A_LEVEL, x] for x in good]
    limits, states = run(threshold, np.concatenate(rows))

    expected_limits, expected = run(QUICK, good)
    found = limits.reshape(12, -1)
    np.testing.assert_array_equal(found[:, -1], expected_limits)
    np.testing.assert_array_equal(found, np.tile(found[:, -1:], found.shape[1]))
    inner = getattr(states, "inner", states)
    after_good = jax.tree.map(lambda x: x[len(NOT_A_LEVEL) :: 6], inner)
    chex.assert_trees_all_equal(after_good, expected)


def test_zeros_in_the_warm_up_delay_it_until_the_first_gradient():
    limits, states = run(QUICK, [0.0] * 20 + [5.0] * 6)
    np.testing.assert_array_equal(states.step[:20], 0)
    np.testing.assert_array_equal(limits[:23], np.inf)
    np.testing.assert_allclose(limits[23:], 6.25, rtol=ROUNDING)


@pytest.mark.parametrize("size", [1.2, 10.0, 1e6, 3e38])
def test_one_value_of_any_size_raises_the_level_by_a_thousandth_at_most(size):
    before = last(run(PUBLISHED, noisy(150))[1])
    _, states = run(PUBLISHED, [size * min(float(before.level), 1.0)], before)
    growth = float(states.level[0]) / float(before.level) - 1
    assert growth == pytest.approx(0.02 * 0.05, abs=ROUNDING)


def test_one_huge_value_in_the_warm_up_leaves_no_trace():
    limits, _ = run(QUICK, [1.0, 1e30, 1.0, 1.0])
    assert limits[3] == np.float32(1.25)


# --- adaptation ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10.0, 50.0])
def test_a_lasting_rise_is_followed_by_a_thousandth_a_value(factor):
    # Abnormal until 1.05·1.001ⁿ reaches the factor.
    abnormal = int(np.ceil(np.log(factor / 1.05) / np.log1p(0.001)))
    assert abnormal == {10.0: 2255, 50.0: 3866}[factor]
    rng = np.random.default_rng(0)
    streams = 1 + 0.05 * rng.standard_normal((6, 4400))
    streams[0] = 1.0
    streams[:, 200:] *= factor
    streams = streams.astype(np.float32)
    above = (streams > np.asarray(together(PUBLISHED)(streams)[0]))[:, 200:]
    assert above[0].argmin() == pytest.approx(abnormal, abs=1)  # a rounding of 4e-5
    assert not above[0, abnormal + 1 :].any()
    # With noise the first normal value is one of the low ones, a tenth below the mean.
    first_normal = above[1:].argmin(axis=1)
    assert (first_normal > abnormal - 250).all()
    assert (first_normal < abnormal).all()


def test_a_fall_is_followed_by_a_fiftieth_a_value():
    _, states = run(PUBLISHED, [1.0] * 100 + [0.1] * 50)
    np.testing.assert_allclose(
        states.level[100:], 0.1 + 0.9 * 0.98 ** np.arange(1, 51), rtol=RTOL
    )


@pytest.mark.parametrize(("factor", "rows"), [(10.0, 1), (50.0, 2)])
def test_relearn_accepts_a_lasting_rise_within_a_row_per_factor_of_ten(factor, rows):
    values = np.where(np.arange(300) < 150, 1.0, factor)
    limits, _ = run(RELEARN, values)
    above = (values > limits)[150:]
    assert above[: 25 * rows].all()
    assert not above[25 * rows :].any()
    assert limits[150 + 25 * rows] == pytest.approx(1.05 * factor, rel=ROUNDING)
    # Until a row is full, relearn is the wrapped threshold.
    np.testing.assert_array_equal(limits[:175], run(PUBLISHED, values[:175])[0])


def test_relearn_follows_a_noisy_rise_in_a_few_rows():
    rng = np.random.default_rng(0)
    streams = np.exp(0.05 * rng.standard_normal((20, 400)))
    streams[:, 200:] *= 10
    _, states = together(RELEARN)(streams.astype(np.float32))
    # Rebased to one noisy value, at worst 3σ = 15 % below the level, by 25 values.
    levels = np.asarray(states.inner.level)[:, 200 + 25 :]
    assert (levels > 8.5).all()
    assert (levels < 12).all()


# --- rebase ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 20])
def test_rebase_sets_the_level_and_arms(steps):
    state = last(run(QUICK, noisy(steps))[1]) if steps else QUICK.init()
    rebased = compiled(QUICK.rebase)(7.0, state)
    assert rebased.level == 7
    assert rebased.step == max(steps, 3)
    limits, _ = run(QUICK, [7.0], rebased)
    assert limits[0] == np.float32(7 * 1.25)


@pytest.mark.parametrize("bad", NOT_A_LEVEL)
def test_rebase_to_what_is_no_level_changes_nothing(bad):
    for state in (QUICK.init(), last(run(QUICK, noisy(9))[1])):
        chex.assert_trees_all_equal(compiled(QUICK.rebase)(bad, state), state)


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
    assert np.isfinite(limits[-1])
    assert limits[-1] > 0


SOME_VALUES = st.one_of(
    st.floats(width=32),
    st.sampled_from([np.nan, np.inf, 0.0, 1e-45, 1e-38, 1.0, 1.5, 1e19, 3e38, 3.4e38]),
)
FAST = thresholds.relearn(thresholds.ema_ratio(8.0, decay=0.0, warmup=1), after=1)


@jax.jit
def follow_every(values):
    return [follow(each, values) for each in (*EVERY.values(), FAST)]


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(values=st.lists(SOME_VALUES, min_size=16, max_size=16))
@full
def test_no_stream_makes_a_state_infinite_or_a_limit_nan(values):
    for limits, states in follow_every(np.array(values, np.float32)):
        chex.assert_tree_all_finite(states)
        assert (np.asarray(limits) >= 0).all()  # NaN would not be


@pytest.mark.parametrize("threshold", EVERY.values(), ids=EVERY.keys())
def test_a_scan_over_fifty_streams_equals_fifty_loops(threshold):
    streams = np.stack(
        [noisy(14, seed=s, level=10.0 ** (s % 9), spikes=0.1) for s in range(50)]
    )
    streams[0, 7], streams[1, 0], streams[2, 10] = np.nan, np.inf, 0.0
    found = jax.tree.map(np.asarray, together(threshold)(streams))
    for i, stream in enumerate(streams):
        limits, states = jax.tree.map(lambda x, i=i: x[i], found)
        expected_limits, expected = run(threshold, stream)
        np.testing.assert_allclose(limits, expected_limits, rtol=RTOL)
        chex.assert_trees_all_close(states, expected, rtol=RTOL)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_traced_hyperparameters_equal_static_ones(dtype):
    values = noisy(30, spikes=0.1)

    @jax.jit
    def traced(values, ratio, decay, warmup):
        threshold = thresholds.ema_ratio(ratio, decay=decay, warmup=warmup)
        return follow(threshold, values)

    limits, states = traced(values, dtype(1.25), dtype(0.5), 3)
    expected, expected_states = run(QUICK, values)
    assert limits.dtype == states.level.dtype == jnp.float32
    np.testing.assert_allclose(limits, expected, rtol=ROUNDING)
    chex.assert_trees_all_close(states, expected_states, rtol=ROUNDING)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "remedy"),
    [
        ("ratio", 0.0, ValueError, "1.05 is the published value"),
        ("ratio", -1, ValueError, "1.05 is the published value"),
        ("ratio", np.inf, ValueError, "1.05 is the published value"),
        ("ratio", "1.05", TypeError, "must be a number"),
        ("decay", 1.0, ValueError, "0.98 averages about 50 values"),
        ("decay", -0.1, ValueError, "0.98 averages about 50 values"),
        ("decay", True, TypeError, "must be a number"),
        ("warmup", 0, ValueError, "100 is the published value"),
        ("warmup", 2.5, ValueError, "100 is the published value"),
        ("warmup", None, TypeError, "must be a number"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(
    name, value, error, remedy
):
    with pytest.raises(error) as raised:
        thresholds.ema_ratio(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)
