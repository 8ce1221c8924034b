"""Rounding for storage: unbiased, never stuck, never infinite, never lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import quick_only

from optax_stability._core import _numerics

NARROW = [jnp.bfloat16, jnp.float16]
TINY = float(np.finfo(np.float32).tiny)
# A quotient, a product, a sum and a root, each within half of 1.2e-7.
ROUNDING = 3e-7
STEPS = 4096
# One rounding is half a spacing or less from the mean of the two results, so the mean
# of 4096 has a standard error of 1/128 spacing: five of them.
SPACINGS = 0.04


@functools.partial(jax.jit, static_argnames="dtype")
def rounded(x, steps, dtype):
    """``x`` as each of the steps stores it, one row per step."""
    return jax.vmap(lambda step: _numerics.round_stochastically(x, step, dtype))(steps)


@functools.partial(jax.jit, static_argnames="dtype")
def held(x, dtype):
    return _numerics.saturating_cast(x, dtype)


def all_positive(dtype):
    """Every finite number of a dtype whose spacing is a normal float32."""
    bits = np.arange(1, np.asarray(jnp.finfo(dtype).max, dtype).view(np.uint16) + 1)
    values = bits.astype(np.uint16).view(dtype)
    info = jnp.finfo(dtype)
    smallest = max(float(info.smallest_subnormal), TINY / float(info.eps))
    return values[values.astype(np.float32) >= smallest]


def ends(x, dtype):
    """The numbers of a dtype next below and next above each x that is none of them."""
    values = all_positive(dtype).astype(np.float32)
    i = np.searchsorted(values, x)
    return values[i - 1], values[i]


def between(dtype, count=400, low=-3.0, high=3.0):
    """Numbers of ordinary size that a dtype does not hold."""
    rng = np.random.default_rng(0)
    x = (10.0 ** rng.uniform(low, high, count)).astype(np.float32)
    return x[x != x.astype(dtype).astype(np.float32)]


# --- increment -------------------------------------------------------------------


def test_a_count_stops_at_the_largest_integer_instead_of_turning_negative():
    largest = np.iinfo(np.int32).max
    counts = jnp.array([0, 1, largest - 1, largest], jnp.int32)
    found = _numerics.increment(counts)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [1, 2, largest, largest])


# --- hypot -----------------------------------------------------------------------


def test_hypot_equals_float64_wherever_float32_reaches():
    a, b = 10.0 ** np.random.default_rng(0).uniform(-37.0, 38.5, (2, 2000))
    a[:1000] = b[:1000] * np.random.default_rng(1).uniform(0.1, 1.0, 1000)
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = np.hypot(a.astype(np.float64), b.astype(np.float64))
    fits = expected < np.finfo(np.float32).max
    results = jax.jit(_numerics.hypot)(a, b)
    np.testing.assert_allclose(np.asarray(results)[fits], expected[fits], rtol=ROUNDING)


def test_hypot_with_zero_is_the_other_number():
    x = np.array([0.0, 1.2e-38, 1.0, 3e38], np.float32)
    for results in (_numerics.hypot(x, 0 * x), _numerics.hypot(0 * x, x)):
        np.testing.assert_array_equal(results, x)


# --- round_stochastically --------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@quick_only("float16")
def test_the_result_is_the_number_below_or_the_number_above(dtype):
    x = between(dtype)
    below, above = ends(x, dtype)
    results = np.asarray(rounded(x, jnp.arange(64), dtype)).astype(np.float32)
    assert ((results == below) | (results == above)).all()
    assert (results == below).any(axis=0).mean() > 0.9
    assert (results == above).any(axis=0).mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (jnp.bfloat16, -3.0, 3.0),
        (jnp.bfloat16, -35.0, -33.0),
        (jnp.float16, -3.0, 3.0),
        (jnp.float16, -7.0, -4.5),
    ],
    ids=["bfloat16", "tiny bfloat16", "float16", "subnormal float16"],
)
def test_the_mean_over_steps_is_the_number_itself(dtype, low, high):
    x = between(dtype, count=200, low=low, high=high)
    below, above = ends(x, dtype)
    results = np.asarray(rounded(x, jnp.arange(STEPS), dtype)).astype(np.float64)
    error = (results.mean(axis=0) - x) / (above - below)
    assert np.abs(error).max() < SPACINGS


@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_is_right_just_above_a_power_of_two_too(dtype):
    # There the spacing below is half of that above.
    spacing = float(jnp.finfo(dtype).eps)
    x = (1 + spacing * np.linspace(0.05, 0.95, 19)).astype(np.float32)
    results = np.asarray(rounded(x, jnp.arange(STEPS), dtype)).astype(np.float64)
    error = (results.mean(axis=0) - x) / spacing
    assert np.abs(error).max() < SPACINGS


@pytest.mark.parametrize("dtype", NARROW)
def test_a_number_that_the_dtype_holds_is_kept_at_every_step(dtype):
    x = all_positive(dtype)
    results = rounded(x.astype(np.float32), jnp.arange(16), dtype)
    np.testing.assert_array_equal(results, np.broadcast_to(x, (16, *x.shape)))


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_not_zero_stays_positive_and_finite(dtype):
    x = np.array([1.2e-38, 1e-30, 1e-9, 7e-8, 6.5e4, 7e4, 1e30, 3.4e38], np.float32)
    results = np.asarray(rounded(x, jnp.arange(64), dtype)).astype(np.float32)
    smallest = max(float(jnp.finfo(dtype).smallest_subnormal), TINY)
    assert (results >= np.float32(smallest)).all()
    assert (results <= float(jnp.finfo(dtype).max)).all()


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
def test_zero_stays_zero(dtype):
    assert not np.asarray(rounded(np.zeros(3, np.float32), jnp.arange(16), dtype)).any()


@pytest.mark.parametrize("exponent", [-100, -7, 1, 100])
def test_a_power_of_two_changes_no_choice_in_bfloat16(exponent):
    x, factor = between(jnp.bfloat16), np.float32(2.0**exponent)
    results = rounded(x, jnp.arange(8), jnp.bfloat16).astype(jnp.float32)
    scaled = rounded(x * factor, jnp.arange(8), jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(scaled, np.asarray(results) * factor)


@pytest.mark.parametrize("exponent", [-3, 1, 5])
def test_a_power_of_two_changes_no_choice_among_normal_float16(exponent):
    x, factor = between(jnp.float16, low=-1.0, high=1.0), np.float32(2.0**exponent)
    results = rounded(x, jnp.arange(8), jnp.float16).astype(jnp.float32)
    scaled = rounded(x * factor, jnp.arange(8), jnp.float16).astype(jnp.float32)
    np.testing.assert_array_equal(scaled, np.asarray(results) * factor)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_repeated_step_gives_the_same_bits_and_another_step_other_ones(dtype):
    x = between(dtype)
    once, again, later = (rounded(x, jnp.array([step]), dtype) for step in (5, 5, 6))
    np.testing.assert_array_equal(once, again)
    assert 0.2 < np.mean(np.asarray(once) != np.asarray(later)) < 0.8


@pytest.mark.parametrize("dtype", NARROW)
def test_the_choices_of_neighbours_and_of_successive_steps_are_not_related(dtype):
    # Same distance from the number below, different mantissas: a fair coin each.
    spacing = float(jnp.finfo(dtype).eps)
    x = (1 + spacing * (np.arange(1, 101) + 0.5)).astype(np.float32)
    below, _ = ends(x, dtype)
    ups = np.asarray(rounded(x, jnp.arange(STEPS), dtype)).astype(np.float32) > below
    signs = 2.0 * ups - 1.0
    # Sums of ±1 of about 400 000 fair products: five standard deviations.
    assert abs(np.mean(signs[:, 1:] * signs[:, :-1])) < 5 / np.sqrt(signs.size)
    assert abs(np.mean(signs[1:] * signs[:-1])) < 5 / np.sqrt(signs.size)


def test_float32_is_stored_as_it_is():
    x = np.array([1e-37, 1.1, 3e38], np.float32)
    np.testing.assert_array_equal(rounded(x, jnp.arange(2), jnp.float32), [x, x])


# --- saturating_cast -------------------------------------------------------------


def test_what_float16_cannot_hold_becomes_its_largest_number():
    x = np.array([65504.0, 65520.0, 7e4, 3e38, -7e4, -3e38], np.float32)
    expected = np.array([65504, 65504, 65504, 65504, -65504, -65504], np.float16)
    np.testing.assert_array_equal(held(x, jnp.float16), expected)


def test_the_largest_float32_stays_finite_in_bfloat16():
    x = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32)
    largest = float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_array_equal(held(x, jnp.bfloat16), [largest, -largest])


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
def test_what_fits_is_rounded_to_nearest(dtype):
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    results = held(x, dtype)
    assert results.dtype == dtype
    np.testing.assert_array_equal(results, jnp.asarray(x).astype(dtype))


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e37])
def test_hypot_forms_no_square(scale):
    a, b = np.float32(3 * scale), np.float32(4 * scale)
    found = float(_numerics.hypot(a, b))
    assert found == pytest.approx(5 * scale, rel=1e-6)
    assert float(_numerics.hypot(np.float32(0), b)) == b
    assert float(_numerics.hypot(np.float32(0), np.float32(0))) == 0.0


def test_a_count_stops_at_the_largest_int32():
    largest = jnp.iinfo(jnp.int32).max
    assert int(_numerics.increment(jnp.int32(0))) == 1
    assert int(_numerics.increment(jnp.int32(largest))) == largest


@pytest.mark.parametrize(
    ("x", "finite"), [(0.0, True), (-3.4e38, True), (np.inf, False), (np.nan, False)]
)
def test_is_finite_is_that_of_numpy(x, finite):
    assert bool(_numerics.is_finite(jnp.float32(x))) is finite is bool(np.isfinite(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_leaf_is_scaled_in_float32_and_keeps_its_dtype(dtype):
    leaf = jnp.array([3e4, -2.0, 0.0], dtype)
    scaled = _numerics.scale(leaf, jnp.float32(1e-3))
    assert scaled.dtype == dtype
    wide = np.asarray(leaf, np.float32) * np.float32(1e-3)
    np.testing.assert_array_equal(scaled, wide.astype(dtype))


def test_a_leaf_is_scaled_by_a_plain_number_in_its_own_dtype():
    """Also where the plain number would be a float64."""
    leaf = np.linspace(1, 2, 999, dtype=np.float32)
    with jax.enable_x64(True):
        scaled = _numerics.scale(leaf, 0.1)
        wide = _numerics.scale(leaf, jnp.float64(0.1))
    np.testing.assert_array_equal(scaled, leaf * np.float32(0.1))
    np.testing.assert_array_equal(wide, (leaf * np.float64(0.1)).astype(np.float32))
    assert np.any(scaled != wide)


def test_a_leaf_times_one_is_itself_bit_for_bit():
    leaf = jax.random.normal(jax.random.key(0), (50,), jnp.bfloat16)
    scaled = _numerics.scale(leaf, jnp.float32(1.0))
    np.testing.assert_array_equal(scaled, leaf)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 2)])
@pytest.mark.parametrize(
    ("factor", "x"), [(2.0**32, 1e-25), (2.0**-66, 3e38), (2.0**-62, 8e37)]
)
def test_what_is_squared_is_scaled_first(shape, factor, x):
    """XLA makes factor²·x² of it, for scalars at least, unless the factor is hidden."""
    squared = jax.jit(lambda x: _numerics.square_at(factor, x))
    found = squared(jnp.full(shape, x, jnp.float32))
    exact = (factor * float(np.float32(x))) ** 2
    np.testing.assert_allclose(found, exact, rtol=1e-6)


# --- derivatives ----------------------------------------------------------------------


DIFFERENTIABLE = {
    "root": (_numerics.root, [(4.0,), (0.0,)]),
    "hypot": (_numerics.hypot, [(3.0, 4.0), (0.0, 2.0), (1e30, 1e-30), (0.0, 0.0)]),
    "quotient": (
        _numerics.quotient,
        [(3.0, 4.0), (0.0, 2.0), (1e-30, 1e-30), (0.0, 0.0)],
    ),
    "angle": (_numerics.angle, [(3.0, 4.0), (-1e-30, 2e-30), (0.0, 0.0)]),
}
PLAIN = {
    "root": np.sqrt,
    "hypot": np.hypot,
    "quotient": np.divide,
    "angle": np.arctan2,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_are_those_of_the_function_and_0_at_0(name):
    function, points = DIFFERENTIABLE[name]
    for point in points:
        found = jax.grad(function, tuple(range(len(point))))(*map(jnp.float32, point))
        for i, slope in enumerate(found):
            if not any(point):
                assert slope == 0
                continue
            step = 1e-6 * max(map(abs, point))
            ends = []
            for sign in (1, -1):
                moved = np.array(point, np.float64)
                moved[i] += sign * step
                ends.append(PLAIN[name](*moved))
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)


def test_stochastic_rounding_has_the_derivative_of_its_mean():
    def stored(x):
        return _numerics.round_stochastically(x, jnp.int32(3), jnp.bfloat16)

    assert jax.grad(lambda x: stored(x).astype(jnp.float32))(jnp.float32(1.3)) == 1
