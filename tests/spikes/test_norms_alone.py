"""``spike_guard(loss=False)``: norms alone, for trainers that pass no loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost
from optax_stability import thresholds

PARAMS = {"w": np.zeros(2, np.float32)}
GUARD = ost.spike_guard(optax.identity(), loss=False)
STEP = jax.jit(GUARD.update)


def after(norms, state=None):
    """The last update and state after gradients of these norms."""
    state, updates = GUARD.init(PARAMS) if state is None else state, None
    for norm in norms:
        updates, state = STEP({"w": np.float32([norm, 0.0])}, state, PARAMS)
    return updates, state


@functools.cache
def quiet():
    """The state after more normal steps than one skip costs."""

    def step(state, _):
        return GUARD.update({"w": jnp.array([1.0, 0.0])}, state, PARAMS)[1], None

    return jax.lax.scan(step, GUARD.init(PARAMS), length=1005)[0]


def test_no_loss_is_asked_for():
    updates, state = after([1.0])
    np.testing.assert_array_equal(updates["w"], [1.0, 0.0])
    assert state.metrics["skip/value_limit"] == np.inf


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "nan"), (np.inf, "inf")])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad, kind):
    updates, state = after([bad] * 3)
    assert state.skipped
    assert state.metrics[f"skip/{kind}_total"] == 3
    np.testing.assert_array_equal(updates["w"], 0.0)


def test_a_large_norm_is_scaled_to_its_limit():
    """The limit is five times the trend: steps are not lost for want of a loss."""
    updates, state = after([1.0] * 30 + [1e4])
    assert not state.skipped
    assert state.metrics["skip/declined_total"] == 1
    np.testing.assert_allclose(updates["w"], [5.0, 0.0], rtol=1e-5)


def test_a_thousand_normal_steps_earn_one_skip():
    updates, state = after([1e4], quiet())
    assert state.skipped
    np.testing.assert_array_equal(updates["w"], 0.0)
    updates, state = after([1e4], state)
    assert not state.skipped


def test_another_share_can_be_wanted():
    tx = ost.spike_guard(optax.identity(), loss=False, max_share=0.5)
    state = tx.init(PARAMS)
    for norm in (*[1.0] * 30, 1e4):
        _, state = jax.jit(tx.update)({"w": np.float32([norm, 0.0])}, state, PARAMS)
    assert state.skipped


def test_a_loss_that_is_given_all_the_same_is_reported_and_must_be_finite():
    grads = {"w": np.ones(2, np.float32)}
    _, state = STEP(grads, GUARD.init(PARAMS), PARAMS, value=jnp.float32(3.0))
    assert state.metrics["skip/value"] == 3.0
    _, state = STEP(grads, state, PARAMS, value=jnp.float32(jnp.nan))
    assert state.skipped
    _, state = STEP(grads, state, PARAMS, value=jnp.float32(1e9))
    assert not state.skipped


@pytest.mark.parametrize("name", ["value", "confirm"])
def test_a_threshold_on_the_loss_contradicts_it(name):
    with pytest.raises(ValueError, match=rf"{name}=constant\(5\.0\).*leave out {name}"):
        ost.spike_guard(
            optax.identity(), loss=False, **{name: thresholds.constant(5.0)}
        )


def test_no_threshold_on_the_loss_does_not_contradict_it():
    ost.spike_guard(optax.identity(), loss=False, value=None, confirm=None)


@pytest.mark.parametrize("loss", [None, 2.5, jnp.float32(1.0), jnp.array(False)])
def test_the_loss_itself_is_no_argument(loss):
    with pytest.raises(TypeError, match=r"loss=.* must be True.*argument of update"):
        ost.spike_guard(optax.identity(), loss=loss)


def test_a_missing_loss_says_what_to_do_when_the_call_is_not_yours():
    tx = ost.spike_guard(optax.identity())
    with pytest.raises(ValueError, match=r"trainer.*spike_guard\(inner, loss=False\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
