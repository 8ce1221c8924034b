"""Moments that start afresh: when, with what, and what stays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import quick_only

import optax_stability as ost
from optax_stability import thresholds

PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
ROUNDING = 1e-6
ADAMS = {"ours": ost.scale_by_safe_adam(), "optax": optax.scale_by_adam()}


def grads(seed, scale=1.0):
    key = jax.random.key(seed)
    return jax.tree.map(lambda x: scale * jax.random.normal(key, x.shape), PARAMS)


def run(tx, trees):
    step = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
    state, updates, states = tx.init(PARAMS), [], []
    for tree in trees:
        update, state = step(tree, state)
        updates.append(update)
        states.append(state)
    return updates, states


def assert_close(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("adam", ADAMS.values(), ids=ADAMS.keys())
@quick_only("optax")
def test_every_so_many_steps_it_is_a_new_optimizer(adam):
    trees = [grads(seed) for seed in range(10)]
    updates, states = run(ost.restart_moments(adam, every=4), trees)
    for start in (0, 4, 8):
        expected, _ = run(adam, trees[start : start + 4])
        assert_close(updates[start : start + 4], expected)
    assert [int(s.total) for s in states] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [int(s.age) for s in states] == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert int(states[-1].last_step) == 7


def test_before_the_first_restart_updates_are_those_of_inner_bit_for_bit():
    trees = [grads(seed) for seed in range(5)]
    inner = optax.trace(0.9)
    updates, _ = run(ost.restart_moments(inner, every=9, warmup=5), trees)
    chex.assert_trees_all_equal(updates, run(inner, trees)[0])


def test_the_spike_is_stepped_on_with_the_old_moments_and_then_forgotten():
    tx = ost.restart_moments(
        optax.trace(0.9), on_spike=thresholds.window_median(5.0, window=4)
    )
    trees = [grads(seed) for seed in range(6)]
    trees[3] = grads(3, scale=100.0)
    updates, states = run(tx, trees)
    assert_close(updates[:4], run(optax.trace(0.9), trees[:4])[0])
    assert_close(updates[4:], run(optax.trace(0.9), trees[4:])[0])
    assert int(states[-1].total) == 1
    assert int(states[-1].last_step) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_gradient_restarts_nothing_and_is_not_learned(bad):
    tx = ost.restart_moments(
        ost.scale_by_safe_adam(), on_spike=thresholds.window_median(5.0, window=4)
    )
    trees = [grads(seed) for seed in range(5)]
    trees[3]["a"] = trees[3]["a"].at[0].set(bad)
    updates, states = run(tx, trees)
    chex.assert_tree_all_finite(updates)
    assert int(states[-1].total) == 0
    chex.assert_trees_all_equal(states[3].threshold, states[2].threshold)


def test_after_a_restart_the_update_grows_back_along_a_cosine():
    trees = [{"a": jnp.ones(3), "b": jnp.ones((2, 2))}] * 9
    updates, _ = run(ost.restart_moments(optax.identity(), every=4, warmup=2), trees)
    share = [float(update["a"][0]) for update in updates]
    rising = [0.5 - 0.5 * np.cos(np.pi * k / 3) for k in (1, 2)]
    np.testing.assert_allclose(
        share, [1, 1, 1, 1, *rising, 1, 1, rising[0]], rtol=ROUNDING
    )


def test_a_spike_at_every_step_still_trains():
    tx = ost.restart_moments(
        ost.scale_by_safe_adam(), on_spike=thresholds.constant(1e-3)
    )
    updates, states = run(tx, [grads(seed) for seed in range(6)])
    assert int(states[-1].total) == 6
    for update in updates:
        np.testing.assert_allclose(np.abs(update["a"]), 1.0, rtol=1e-5)


def test_the_norm_is_that_of_all_devices_under_shard_map():
    tx = ost.restart_moments(
        optax.trace(0.9), on_spike=thresholds.constant(3.0), axis_name="data"
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    params = {"w": jnp.zeros(8)}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: spec("data") if x.ndim else spec(), state)
    step = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(spec("data"), specs, spec("data")),
        out_specs=(spec("data"), specs),
    )
    # Norm 2.8 on one device alone, 4 on all of them.
    one, all_of_them = jnp.zeros(8).at[:2].set(2.0), jnp.full(8, 2.0**0.5)
    _, state = jax.jit(step)({"w": one}, state, params)
    assert int(state.total) == 0
    _, state = jax.jit(step)({"w": all_of_them}, state, params)
    assert int(state.total) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "every=None and on_spike=None"),
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 5, "warmup": -1}, ValueError, "warmup=-1"),
        ({"on_spike": 3.0}, TypeError, r"on_spike must be a Threshold.*constant"),
    ],
)
def test_bad_arguments_raise_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        ost.restart_moments(optax.identity(), **arguments)


def test_missing_params_raise_and_name_the_remedy():
    tx = ost.restart_moments(optax.identity(), every=5)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_extra_arguments_reach_inner():
    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = ost.restart_moments(inner, every=5)
    updates, _ = functools.partial(tx.update, value=2.0)(
        grads(0), tx.init(PARAMS), PARAMS
    )
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 2.0 * g, grads(0)))
