"""Switching on and off with the noise scale."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_noise_drift import gaussian
from test_noise_scale import synthetic
from tiers import full

import optax_stability as ost

PARAMS = {"w": jnp.ones(())}
HALF = optax.scale(0.5)


def run(tx, traces, params=PARAMS):
    """Whether it acted, and the state, after steps of some trace and ‖G‖² = 1."""
    state, update, acted = tx.init(params), jax.jit(tx.update), []
    for trace in traces:
        moments = synthetic(trace, 1.0)
        updates, state = update(params, state, params, moments=moments)
        acted.append(float(updates["w"]) != 1.0)
        assert bool(ost.metrics(state)["when_noisy/active"]) == acted[-1]
    return acted, state


def quick(**settings):
    return ost.estimate_noise_scale(decay=0.5, scope="global", **settings)


def test_it_switches_with_the_noise_and_not_between_the_levels():
    tx = ost.when_noisy(HALF, above=10.0, below=2.0, estimator=quick())
    quiet, noisy, between = [1.0] * 12, [100.0] * 12, [5.0] * 30
    acted, _ = run(tx, quiet + noisy + between + quiet + between)
    blocks = np.split(np.array(acted), np.cumsum([12, 12, 30, 12])[:4])
    assert not blocks[0].any()
    assert blocks[1][-1]
    assert blocks[2].all()
    assert not blocks[3][-1]
    assert not blocks[4].any()


def test_it_switches_only_where_the_whole_interval_is_beyond_the_level():
    """By the rule at every step, also where S jumps by a factor of 15."""
    tx = ost.when_noisy(HALF, above=10.0, below=8.0)
    state, update, on = tx.init(PARAMS), jax.jit(tx.update), False
    for trace in [2.0, 25.0, 4.0, 18.0, 2.0, 30.0] * 10 + [3.0] * 30:
        _, state = update(PARAMS, state, PARAMS, moments=synthetic(trace, 1.0))
        found = ost.metrics(state)
        low, high = found["noise_scale/low"], found["noise_scale/high"]
        on = bool((low > 10) | (on & ~(high < 8)))
        assert bool(found["when_noisy/active"]) == on
    assert not on


STEPS, RUNS = 400, 300


@functools.cache
def switched(dimensions, b_simple, margin):
    """Whether each of many runs is on, [steps, runs]; the level is margin·b_simple."""
    tx = ost.when_noisy(HALF, above=margin * b_simple)
    constant = np.full(STEPS, b_simple)
    observed = gaussian(1, constant, constant, dimensions, 4, 8, RUNS)

    def step(state, both):
        trace, grad_sq = both
        moments = synthetic(0.0, 1.0)._replace(
            deviation=3 * trace[None],
            norm=jnp.sqrt(jnp.maximum(grad_sq + trace / 8, 0))[None],
        )
        state = tx.update(PARAMS, state, moments=moments)[1]
        found = ost.metrics(state)
        beyond = found["noise_scale/low"] > margin * b_simple
        return state, (found["when_noisy/active"], beyond)

    def run(both):
        return jax.lax.scan(step, tx.init(PARAMS), both)[1]

    both = [jnp.asarray(x, jnp.float32) for x in observed]
    return map(np.asarray, jax.jit(jax.vmap(run, 1, 1))(both))


@pytest.mark.parametrize("setting", [(100, 5.0), (100, 50.0), (1000, 50.0), (20, 5.0)])
@full
def test_chance_switches_as_seldom_as_the_interval_says(setting):
    """A constant noise scale. At the level, a step is a reason to switch on in 2.5 %.

    Those steps come in rows, so that runs count: their share of such steps has a
    standard error, and the mean is within four of them. Half the level is so far away
    that a run of 400 steps is on at any time in 2.5 % at most, within four standard
    errors of so many runs.
    """
    _, beyond = switched(*setting, 1.0)
    shares = beyond.mean(0)
    assert shares.mean() <= 0.025 + 4 * shares.std() / RUNS**0.5
    on, _ = switched(*setting, 2.0)
    assert on.any(0).mean() <= 0.025 + 4 * (0.025 * 0.975 / RUNS) ** 0.5


@full
def test_a_lower_bound_is_enough_to_switch_on():
    tx = ost.when_noisy(HALF, above=10.0, estimator=quick())
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for sign in (1, -1) * 6:
        moments = synthetic(1000.0, 1.0)
        norm = jnp.sqrt(1000.0 / 8 + 30.0 * sign)[None]
        moments = moments._replace(norm=norm)
        updates, state = update(PARAMS, state, PARAMS, moments=moments)
    assert not ost.noise_scale(state).valid
    assert float(updates["w"]) == 0.5


@full
def test_the_ratio_to_the_weights_can_be_the_measure():
    tx = ost.when_noisy(HALF, above=2.0, below=1.0, measure="noise_to_weight")
    # √(trace·K/N), of one coordinate: K/N = 1/2.
    acted, _ = run(tx, [1.0, 1.0])
    assert acted == [False, False]
    acted, _ = run(tx, [50.0, 50.0])
    assert acted == [True, True]
    # Without the parameters it is not known, and nothing acts.
    update = jax.jit(tx.update)
    updates, _ = update(PARAMS, tx.init(PARAMS), moments=synthetic(50.0, 1.0))
    assert float(updates["w"]) == 1.0


@full
def test_what_is_inside_learns_all_the_time():
    clip = ost.clip_by_zscore(warmup=2)
    tx = ost.when_noisy(clip, above=1e9)
    _, state = run(tx, [1.0] * 5)
    expected = clip.init(PARAMS)
    for _ in range(5):
        _, expected = clip.update(PARAMS, expected, PARAMS)
    chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"above": -1.0}, ValueError, r"above=-1.0 is outside"),
        ({"above": 1.0, "below": 2.0}, ValueError, r"below=2.0 exceeds above=1.0"),
        ({"above": 1.0, "measure": "b"}, ValueError, r"measure='b' is unknown"),
        ({"above": 1.0, "measure": "noise_to_weight"}, ValueError, "give below="),
        ({"above": 1.0, "estimator": 3}, TypeError, "estimator must be"),
        ({"above": 1.0, "inner": 3}, TypeError, "inner must be"),
    ],
)
def test_what_is_wrong_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        ost.when_noisy(**{"inner": HALF, **arguments})


@full
def test_the_estimator_may_be_wrapped_and_has_to_be_one():
    labels = ost.estimate_noise_scale(scope=lambda tree: {"w": "a"}, decay=0.5)
    injected = optax.inject_hyperparams(ost.estimate_noise_scale)(decay=0.5)
    for estimator in (labels, injected, optax.chain(quick(), optax.identity())):
        tx = ost.when_noisy(HALF, above=10.0, estimator=estimator)
        acted, _ = run(tx, [100.0] * 12)
        assert acted[-1]
    with pytest.raises(ValueError, match="holds no noise scale"):
        ost.when_noisy(HALF, above=1.0, estimator=HALF).init(PARAMS)


def test_without_moments_the_remedy_is_named():
    tx = ost.when_noisy(HALF, above=1.0)
    with pytest.raises(ValueError, match="microbatch_gradients"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
