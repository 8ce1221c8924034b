"""The learning rate of a larger batch: K times, or √K times."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

# A product and a root in float32.
ROUNDING = 1e-6

RULES = {"linear": lambda k: float(k), "sqrt": lambda k: float(np.sqrt(k))}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 2, 8, np.int64(32)])
@pytest.mark.parametrize("lr", [3e-4, 0.0, np.float32(0.25)])
def test_a_number_stays_a_number(lr, k, rule):
    found = ost.scale_learning_rate(lr, k, rule)
    assert isinstance(found, float | np.floating)
    assert found == pytest.approx(float(lr) * RULES[rule](k), rel=ROUNDING)


def test_the_rule_of_adam_with_microbatches_is_the_default():
    assert ost.scale_learning_rate(0.5, 9) == 4.5
    assert ost.scale_learning_rate(0.5, 9, rule="linear") == 4.5


def test_one_microbatch_changes_nothing():
    for rule in RULES:
        assert ost.scale_learning_rate(3e-4, 1, rule) == 3e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_of_the_rate_is_scaled_at_every_step(rule):
    rate = optax.schedules.cosine_decay_schedule(1e-3, 100)
    found = ost.scale_learning_rate(rate, 8, rule)
    for step in (0, 1, 50, 100):
        expected = float(rate(step)) * RULES[rule](8)
        assert float(found(step)) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_microbatches_may_be_a_schedule(rule):
    def every_k(step):
        return jnp.where(step < 10, 2, 18)

    def rate(step):
        return 1.0 / (1.0 + step)

    number = ost.scale_learning_rate(0.5, every_k, rule)
    both = ost.scale_learning_rate(rate, every_k, rule)
    for step, k in ((0, 2), (9, 2), (10, 18), (30, 18)):
        factor = RULES[rule](k)
        assert float(number(step)) == pytest.approx(0.5 * factor, rel=ROUNDING)
        assert float(both(step)) == pytest.approx(rate(step) * factor, rel=ROUNDING)


@pytest.mark.parametrize("rule", RULES)
def test_rate_and_number_may_be_traced(rule):
    scale = jax.jit(lambda lr, k: ost.scale_learning_rate(lr, k, rule))
    expected = 1e-3 * RULES[rule](8)
    for k in (jnp.int32(8), jnp.float32(8)):
        found = scale(jnp.float32(1e-3), k)
        assert found.dtype == jnp.float32
        assert float(found) == pytest.approx(expected, rel=ROUNDING)


def test_a_rate_in_bfloat16_stays_one():
    found = ost.scale_learning_rate(jnp.bfloat16(0.5), 4, "sqrt")
    assert found.dtype == jnp.bfloat16
    assert float(found) == 1.0


def test_the_schedules_of_an_accumulating_optimizer_count_its_steps():
    def every_k(step):
        return jnp.where(step < 1, 2, 4)

    rate = ost.scale_learning_rate(0.1, every_k)
    tx = ost.accumulate_moments(optax.sgd(rate), every_k)
    params = jnp.zeros(())
    state, update = tx.init(params), jax.jit(tx.update)
    moved = []
    for _ in range(10):
        updates, state = update(jnp.ones(()), state, params)
        if ost.has_updated(state):
            moved.append(float(updates))
    # lr·K per step: as far as one step of lr per microbatch.
    assert moved == pytest.approx([-0.2, -0.4, -0.4], rel=ROUNDING)


def test_it_keeps_the_course_of_sgd_on_a_small_rate():
    params, far = jnp.float32(1.0), {}
    for k in (1, 8):
        tx = ost.accumulate_moments(optax.sgd(ost.scale_learning_rate(1e-4, k)), k)
        state, update, x = tx.init(params), jax.jit(tx.update), params
        for _ in range(64):
            updates, state = update(x, state, x)  # the gradient of x²/2
            x = x + updates
        far[k] = 1 - float(x)
    # The second order is (lr·K)/2 of the first: 4e-4.
    assert far[8] == pytest.approx(far[1], rel=1e-3)


@pytest.mark.parametrize("rule", ["root", "Linear", None, 0.5])
def test_an_unknown_rule_raises_and_names_the_choices(rule):
    with pytest.raises(ValueError, match="'linear', 'sqrt'") as raised:
        ost.scale_learning_rate(1e-3, 2, rule)
    assert f"rule={rule!r}" in str(raised.value)


@pytest.mark.parametrize("k", [0, -1, 2.5, 4.0, float("nan")])
def test_a_number_of_microbatches_below_one_or_no_integer_raises(k):
    with pytest.raises(ValueError, match=r"num_microbatches=.* at least 1"):
        ost.scale_learning_rate(1e-3, k)


@pytest.mark.parametrize("k", ["8", None, True])
def test_a_number_of_microbatches_that_is_no_number_raises(k):
    with pytest.raises(TypeError, match="num_microbatches must be a number"):
        ost.scale_learning_rate(1e-3, k)


@pytest.mark.parametrize("k", [8, lambda step: 8], ids=["number", "schedule"])
@pytest.mark.parametrize("lr", ["1e-3", None, True, [1e-3]])
def test_a_rate_that_is_no_number_raises(lr, k):
    with pytest.raises(TypeError, match="lr must be a number"):
        ost.scale_learning_rate(lr, k)


def test_what_can_be_checked_is_checked_when_the_other_is_a_schedule():
    with pytest.raises(ValueError, match="num_microbatches=0"):
        ost.scale_learning_rate(lambda step: 1e-3, 0)
    with pytest.raises(ValueError, match="rule='root'"):
        ost.scale_learning_rate(lambda step: 1e-3, lambda step: 8, "root")
