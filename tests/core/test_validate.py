"""Argument checks: what passes, what raises, and what the message says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost
from optax_stability._core import _validate

CHECKS = {
    "interval": lambda value: _validate.check_interval("x", value, "(0, 1]", "try 0.5"),
    "count": lambda value: _validate.check_count("x", value, 2, "try 3"),
}


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [1e-9, 0.5, 1 - 1e-9], [0, 0.0, 1, 1.0, -0.5, 2]),
        ("[0, 1)", [0, 0.0, -0.0, 0.5], [1, 1.0, -1e-9]),
        ("(0, 1]", [1e-9, 1, 1.0, True + 0.0], [0, 0.0, 1 + 1e-9]),
        ("[0, 1]", [0, 1, 0.5], [-1e-9, 1.5]),
        ("[0, inf)", [0, 1e300, 3], [np.inf, -1]),
        ("(0, inf]", [np.inf, 1e-300], [0, -np.inf]),
    ],
)
def test_an_interval_holds_what_its_brackets_say(interval, inside, outside):
    for value in inside:
        _validate.check_interval("x", value, interval, "try 0.5")
    for value in [*outside, np.nan]:
        with pytest.raises(ValueError, match=r"try 0\.5") as raised:
            _validate.check_interval("x", value, interval, "try 0.5")
        assert f"x={value!r} is outside {interval}" in str(raised.value)


@pytest.mark.parametrize("value", [2, 3, np.int64(2), np.uint8(200)])
def test_a_count_is_an_integer_of_at_least_the_minimum(value):
    CHECKS["count"](value)


@pytest.mark.parametrize("value", [1, 0, -5, 2.0, np.float32(3), np.inf, np.nan])
def test_a_count_that_is_too_small_or_no_integer_raises(value):
    with pytest.raises(ValueError, match="integer of at least 2; try 3") as raised:
        CHECKS["count"](value)
    assert f"x={value!r}" in str(raised.value)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("value", [None, "1", True, False, [1], 1j, object])
def test_what_is_no_number_raises_a_type_error(check, value):
    with pytest.raises(TypeError, match="x must be a number") as raised:
        check(value)
    assert f"x={value!r}" in str(raised.value)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize(
    "value", [jnp.float32(-7.5), np.array(-7.5), jnp.bfloat16(-7.5)], ids=type
)
def test_an_array_passes_because_it_may_be_traced(check, value):
    check(value)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_a_tracer_passes(check):
    def f(value):
        check(value)
        return value

    assert float(jax.jit(f)(-7.5)) == -7.5


@pytest.mark.parametrize(
    "value", [0.5, 1, np.float32(0.5), np.float64(0.5), np.int64(3)]
)
def test_a_number_of_numpy_is_checked_like_one_of_python(value):
    assert _validate.is_concrete(value)


@pytest.mark.parametrize("value", [True, np.array(1.0), jnp.float32(1.0), None, "1"])
def test_an_array_or_a_boolean_is_no_number_to_look_at(value):
    assert not _validate.is_concrete(value)


def test_a_choice_is_one_of_the_names():
    _validate.check_choice("mode", "add", ("add", "max"))


@pytest.mark.parametrize("value", ["sum", "", None, 1, ("add",)])
def test_an_unknown_choice_lists_the_names(value):
    with pytest.raises(ValueError, match="choose one of 'add', 'max'") as raised:
        _validate.check_choice("mode", value, ("add", "max"))
    assert f"mode={value!r}" in str(raised.value)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, "float16", np.dtype("float64")]
)
def test_a_float_dtype_passes(dtype):
    _validate.check_float_dtype("rms_dtype", dtype)


@pytest.mark.parametrize("dtype", [jnp.int32, "int8", bool, jnp.complex64])
def test_another_dtype_raises(dtype):
    with pytest.raises(ValueError, match=r"such as jnp\.float32") as raised:
        _validate.check_float_dtype("rms_dtype", dtype)
    assert f"rms_dtype={dtype!r}" in str(raised.value)


def test_an_array_in_place_of_a_dtype_names_the_static_argument():
    with pytest.raises(TypeError, match="static_args='rms_dtype'"):
        _validate.check_float_dtype("rms_dtype", jnp.float32(1.0))


@pytest.mark.parametrize(
    "value", [jnp.bfloat16(0.5), np.array(0.5), jnp.asarray(0.5), np.array(3)], ids=str
)
def test_an_array_becomes_float32(value):
    converted = _validate.as_float32(value)
    assert converted.dtype == jnp.float32
    assert not converted.weak_type
    assert float(converted) == float(value)


@pytest.mark.parametrize("value", [0.1, 1, np.float64(0.1), np.float32(0.5)])
def test_a_number_stays_in_double_precision_and_brings_no_dtype(value):
    converted = _validate.as_float32(value)
    assert type(converted) is float
    assert converted == value


@pytest.mark.parametrize("value", [2, 8, np.int32(2)])
def test_a_size_is_an_integer(value):
    _validate.check_size("window", value, 2)


@pytest.mark.parametrize("value", [1, 2.5, -3])
def test_a_size_that_is_too_small_or_broken_raises(value):
    with pytest.raises(ValueError, match=f"window={value!r}.*size of an array"):
        _validate.check_size("window", value, 2)


def test_a_traced_size_names_the_static_argument():
    with pytest.raises(TypeError, match="static_args='window'"):
        _validate.check_size("window", jnp.int32(8), 2)


@pytest.mark.parametrize("made", [optax.sgd(0.1), optax.MultiSteps(optax.sgd(0.1), 2)])
def test_a_transformation_is_whatever_has_its_two_functions(made):
    _validate.check_transformation("inner", made)


@pytest.mark.parametrize("wrong", [0.1, None, optax.sgd])
def test_what_is_no_transformation_raises_by_name(wrong):
    for make in (ost.skip_spikes, functools.partial(ost.restart_moments, every=2)):
        with pytest.raises(TypeError, match=r"inner must be an optax.*adamw\(1e-3\)"):
            make(wrong)
