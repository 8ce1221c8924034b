"""Updates that are scaled by the noise scale, and batches that follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_noise_scale import synthetic
from tiers import full, quick_only

import optax_stability as ost

PARAMS = {"w": jnp.ones(())}


def scales(tx, traces, weight=8.0):
    state, update, found = tx.init(PARAMS), jax.jit(tx.update), []
    for trace in traces:
        moments = synthetic(trace, 1.0, weight=weight)
        updates, state = update(PARAMS, state, PARAMS, moments=moments)
        found.append(float(updates["w"]))
        metric = ost.metrics(state)["scale_by_noise_scale/scale"]
        np.testing.assert_allclose(metric, found[-1])
    return found


def test_the_scale_is_that_of_the_rule():
    found = scales(ost.scale_by_noise_scale(64.0), [64.0] * 4)
    # Until three steps were seen nothing is known.
    np.testing.assert_allclose(found, [1, 1, 0.5, 0.5], rtol=1e-6)
    found = scales(ost.scale_by_noise_scale(64.0, max_scale=2.0), [64.0] * 4)
    np.testing.assert_allclose(found, [2, 2, 1, 1], rtol=1e-6)


@full
def test_without_a_batch_size_it_is_that_of_the_moments():
    found = scales(ost.scale_by_noise_scale(None), [24.0] * 4, weight=8.0)
    np.testing.assert_allclose(found[-1], 0.25, rtol=1e-6)


@full
def test_it_stays_above_the_least_and_never_stops_training():
    found = scales(ost.scale_by_noise_scale(1.0, min_scale=0.2), [1e5] * 5)
    np.testing.assert_allclose(found[-1], 0.2)


def test_what_is_not_valid_keeps_the_last_scale():
    tx = ost.scale_by_noise_scale(64.0)
    state, update, found = tx.init(PARAMS), jax.jit(tx.update), []
    # G² far below 0 takes the upper end away.
    for trace, grad_sq in [(64.0, 1.0)] * 4 + [(640.0, -70.0)] * 2:
        moments = synthetic(trace, grad_sq)
        updates, state = update(PARAMS, state, PARAMS, moments=moments)
        found.append((bool(ost.noise_scale(state).valid), float(updates["w"])))
    assert found[3] == (True, 0.5)
    assert found[4:] == [(False, 0.5)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, r"batch_size=0 is outside"),
        ({"max_scale": 0.05}, ValueError, r"min_scale=0.1 is above max_scale=0.05"),
        ({"min_scale": 0.0}, ValueError, r"min_scale=0.0 is outside"),
        ({"estimator": 3}, TypeError, "estimator must be"),
    ],
)
def test_what_is_wrong_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        ost.scale_by_noise_scale(**{"batch_size": 64, **arguments})


# --- batches that follow -------------------------------------------------------------


def known(low):
    """A state whose interval begins at ``low``, of microbatches of 2, or at nothing."""
    tx = ost.estimate_noise_scale(scope="global")
    state, steps = tx.init(PARAMS), 0 if low is None else 4
    for _ in range(steps):
        moments = synthetic(low, 1.0)
        _, state = tx.update(PARAMS, state, PARAMS, moments=moments)
    return state


def chosen(schedule, low):
    return int(jax.jit(schedule.num_microbatches)(known(low)))


@pytest.mark.parametrize(
    ("low", "fraction", "k"),
    [
        (None, 1.0, 2),
        (1.0, 1.0, 2),
        (2 * 4.1, 1.0, 4),
        (2 * 7.9, 1.0, 4),
        (2 * 8.1, 1.0, 8),
        (2 * 8.1, 0.5, 4),
        (1e5, 1.0, 32),
    ],
)
def test_microbatches_are_the_power_of_two_below_the_noise_scale(low, fraction, k):
    assert chosen(ost.batch_size_schedule(max_k=32, fraction=fraction), low) == k


@full
def test_it_is_held_to_its_ends_whether_powers_or_not():
    schedule = ost.batch_size_schedule(5, min_k=3)
    assert [chosen(schedule, low) for low in (None, 2 * 4.1, 1e5)] == [3, 4, 4]


@full
def test_every_power_of_two_is_reached():
    for power in range(1, 16):
        assert chosen(ost.batch_size_schedule(2**power), 1e5) == 2**power


@pytest.mark.parametrize("weight", [None, 16.0])
@quick_only("None")
def test_the_unit_of_the_weights_does_not_matter(weight):
    """Gradients 4 and −2, in turn, in windows of two: S = 18·n, G² = 1 − 18/2."""
    chain = optax.chain(ost.estimate_noise_scale(scope="global"), optax.sgd(0.0))
    tx = ost.accumulate_moments(chain, ost.batch_size_schedule(64))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(40):
        value = 4.0 - 6 * (step % 2) + 0.1 * (step % 3)
        extra = {} if weight is None else {"weight": weight}
        _, state = update({"w": jnp.float32(value)}, state, PARAMS, **extra)
    expected = ost.noise_scale(state).low / (1.0 if weight is None else weight)
    k = int(ost.batch_size_schedule(64).num_microbatches(state.inner_opt_state))
    assert k == max(2, 2 ** int(np.log2(expected)))
    assert k > 2


@full
def test_accumulation_follows_the_noise():
    """One weight, gradients ±s around 1: the noise scale of a microbatch is s²."""
    chain = optax.chain(ost.estimate_noise_scale(scope="global"), optax.sgd(0.0))
    tx = ost.accumulate_moments(chain, ost.batch_size_schedule(max_k=16))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    rng, sizes = np.random.default_rng(0), []
    for spread in (0.1, 6.0, 0.1):
        for _ in range(1000):
            gradient = {"w": jnp.float32(1 + spread * rng.standard_normal())}
            _, state = update(gradient, state, PARAMS)
            if ost.has_updated(state):
                k = int(ost.metrics(state)["accumulate/num_microbatches"])
                sizes.append((spread, k))
    before = {k for spread, k in sizes[:400] if spread == 0.1}
    assert before == {2}
    assert max(sizes) >= (6.0, 8)
    # It is 36, and falls again with the noise.
    assert max(k for _, k in sizes) <= 32
    assert sizes[-1] == (0.1, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_k": 1}, r"min_k=1 must be an integer of at least 2; one microbatch"),
        ({"max_k": 1}, r"max_k=1 must be an integer of at least 2; it must be"),
        ({"fraction": 0}, r"fraction=0 is outside"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        ost.batch_size_schedule(**{"max_k": 8, **arguments})


def test_a_schedule_needs_an_estimate_in_the_chain():
    tx = ost.accumulate_moments(optax.sgd(0.1), ost.batch_size_schedule(max_k=8))
    with pytest.raises(ValueError, match="put estimate_noise_scale"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
