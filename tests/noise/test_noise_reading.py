"""The noise scale as it is read and printed, and what is derived from it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from tiers import full

import optax_stability as ost


def estimate(**values):
    """An estimate as it would be read, with some values."""
    known = {
        "b_simple": 412.3,
        "low": 350.2,
        "high": 504.9,
        "valid": True,
        "trace": 1.0,
        "grad_sq": 1.0,
        "noise_to_weight": 1.0,
        "steps": 199.2,
        "confidence": 0.95,
        "biased": False,
    }
    return ost.NoiseScale(**known | values)


NOT_VALID = {"valid": False, "b_simple": math.nan, "high": math.inf}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "B_simple now = 412 examples (95 %: 350–505), worth 199 steps"),
        (
            {"b_simple": 1234.0, "low": 1e3, "high": 2.5e6, "unit": "tokens"},
            "B_simple now = 1.23k tokens (95 %: 1.00k–2.50M), worth 199 steps",
        ),
        (
            {"b_simple": 0.01234, "low": 0.0, "high": 999.7, "confidence": 0.8},
            "B_simple now = 0.0123 examples (80 %: 0–1.00k), worth 199 steps",
        ),
        (NOT_VALID, "B_simple now ≥ 350 examples (95 %), worth 199 steps"),
        ({**NOT_VALID, "low": 0.0, "steps": 2.0}, "B_simple unknown, worth 2 steps"),
        (
            {"biased": True, "confidence": 0.999},
            "B_simple now = 412 examples (99.9 %: 350–505), worth 199 steps, biased: "
            "from successive steps",
        ),
    ],
)
def test_it_prints_itself(values, text):
    assert repr(estimate(**values)) == text
    assert str(estimate(**values)) == text


def params():
    return {"dense": {"kernel": jnp.ones((2, 3))}, "scale": jnp.ones(())}


@full
def test_it_is_found_wherever_it_is():
    tx = ost.accumulate_moments(ost.skip_spikes(ost.estimate_noise_scale()), 2)
    state = train_state.TrainState.create(apply_fn=None, params=params(), tx=tx)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert set(ost.noise_scale(state).per_leaf) == {"dense/kernel", "scale"}
    assert set(ost.noise_scale(optimizer).per_leaf) == {"kernel", "bias"}


def test_none_or_several_are_refused_with_the_remedy():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="put estimate_noise_scale"):
        ost.noise_scale(tx.init(params()))
    one = ost.estimate_noise_scale()
    state = optax.chain(one, ost.when_noisy(optax.identity(), above=1.0)).init(params())
    with pytest.raises(ValueError, match="holds 2 noise scales"):
        ost.noise_scale(state)
    assert not ost.noise_scale(state[1]).valid


@full
def test_everything_it_holds_is_plain():
    state = ost.estimate_noise_scale().init(params())
    found = ost.noise_scale(state)
    assert math.isnan(found.trace)
    for each in (found, *found.per_leaf.values()):
        for key, value in dataclasses.asdict(each).items():
            assert isinstance(value, float | bool | str | dict), key


@pytest.mark.parametrize(
    ("b_simple", "batch_size", "share"),
    [(400.0, 400, 0.5), (100, 300, 0.25), (0.0, 5, 0.0), (math.inf, 5, 1.0)],
)
def test_batch_efficiency(b_simple, batch_size, share):
    assert ost.batch_efficiency(b_simple, batch_size) == share


def test_batch_efficiency_of_what_is_not_known_and_of_arrays():
    assert math.isnan(ost.batch_efficiency(math.nan, 5))
    scales = jnp.array([1.0, 3.0, 0.0, np.inf, np.nan])
    shares = jax.jit(ost.batch_efficiency)(scales, 1.0)
    np.testing.assert_allclose(shares, [0.5, 0.75, 0.0, 1.0, np.nan])
    with pytest.raises(TypeError, match="b_simple must be a number"):
        ost.batch_efficiency(ost.estimate_noise_scale(), 5)
    with pytest.raises(ValueError, match=r"batch_size=0 is outside"):
        ost.batch_efficiency(1.0, 0)
    with pytest.raises(ValueError, match=r"b_simple=-1 is outside"):
        ost.batch_efficiency(-1, 5)


def test_critical_batch_range():
    assert ost.critical_batch_range(estimate()) == (350.2, 504.9)
    assert ost.critical_batch_range(estimate(**NOT_VALID)) == (350.2, math.inf)
    with pytest.raises(TypeError, match=r"pass noise_scale\(state\)"):
        ost.critical_batch_range(412.0)


def test_outside_jit_it_is_two_programs_compiled_once(caplog):
    params = {f"leaf {i}": jnp.ones(i + 1) for i in range(5)}
    state = ost.estimate_noise_scale().init(params)
    with jax.log_compiles():
        ost.noise_scale(state)
        first = caplog.text.count("Compiling jit(")
        ost.noise_scale(state)
    assert first == 2
    assert caplog.text.count("Compiling jit(") == first
