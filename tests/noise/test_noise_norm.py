"""The noise scale in the L1 norm: closed form, interval, and what it refuses."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiers import full, long_run

import optax_stability as ost
from optax_stability._moments._signs import SignMoments

ROUNDING = 1e-5
PARAMS = {"w": jnp.ones(3), "v": jnp.ones(3)}


def exact(sigma, mean, microbatch, k=4):
    """Moments that say just what is true, of Gaussian noise in two leaves."""
    sigma, mean = np.asarray(sigma, np.float64), np.abs(np.asarray(mean, np.float64))
    root = math.sqrt(math.pi / (2 * microbatch))
    with np.errstate(divide="ignore"):
        signal = root * mean * special.erf(mean * np.sqrt(microbatch / 2) / sigma)
    deviation, agreement = (
        jnp.asarray(factor * x.reshape(2, 3).sum(1), jnp.float32)
        for factor, x in ((k - 1, sigma), (k * (k - 1) / 2, signal))
    )
    return ost.Moments(
        num_microbatches=jnp.int32(k),
        weight=jnp.float32(k * microbatch),
        deviation=jnp.ones(2),
        mean_square=None,
        norm=jnp.ones(2),
        l1=SignMoments(deviation, agreement),
    )


def read(moments, steps=20, **settings):
    tx = ost.estimate_noise_scale(norm="l1", **settings)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(steps):
        _, state = update(PARAMS, state, PARAMS, moments=moments)
    return ost.noise_scale(state)


SIGMA = np.array([1.0, 2.0, 0.5, 4.0, 3.0, 1.0])


@pytest.mark.parametrize("microbatch", [1, 8, 64, 4096])
@pytest.mark.parametrize("b_l1", [0.5, 20.0, 1e4])
def test_with_one_ratio_of_all_entries_it_is_exact_for_every_microbatch(
    microbatch, b_l1
):
    """B_l1 = (‖σ‖₁/‖G‖₁)², the definition of arXiv:2602.03001."""
    found = read(exact(SIGMA, SIGMA / math.sqrt(b_l1), microbatch))
    assert found.valid
    np.testing.assert_allclose(found.b_simple, b_l1, rtol=1e-3)
    np.testing.assert_allclose(found.per_leaf["v"].b_simple, b_l1, rtol=1e-3)
    np.testing.assert_allclose(found.trace, SIGMA.sum(), rtol=ROUNDING)


def test_with_other_entries_it_is_a_lower_bound_of_that_definition():
    """Σσ/Σ(G²/σ) ≤ (‖σ‖₁/‖G‖₁)² by Cauchy and Schwarz."""
    mean = 0.02 * np.array([1.0, -3.0, 0.2, 0.1, 5.0, 0.0])
    found = read(exact(SIGMA, mean, 1))
    expected = SIGMA.sum() / (mean**2 / SIGMA).sum()
    np.testing.assert_allclose(found.b_simple, expected, rtol=1e-3)
    assert expected < (SIGMA.sum() / np.abs(mean).sum()) ** 2


def test_where_no_microbatch_has_noise_it_is_zero():
    found = read(exact(np.zeros(6), np.ones(6), 2))
    assert found.valid
    assert (found.b_simple, found.low, found.high) == (0, 0, 0)


def test_its_noise_to_weight_is_that_of_a_mean_entry():
    """Mean σᵢ of a microbatch of 4, beside parameters of 1."""
    found = read(exact(SIGMA, SIGMA, 4))
    np.testing.assert_allclose(found.noise_to_weight, SIGMA.mean() / 2, rtol=ROUNDING)


def test_it_says_which_norm_it_is():
    found = read(exact(SIGMA, SIGMA, 2))
    assert found.norm == "l1"
    assert repr(found).startswith("B_l1 now = ")


@full
@long_run
def test_its_interval_holds_the_truth_of_a_constant_noise_scale():
    """200 entries of one ratio, from microbatches of 2 and of 16; ratio² = 1/10."""
    sigma = np.exp(np.random.default_rng(0).standard_normal(200)).astype("f4")
    mean = sigma / math.sqrt(10)
    within = []
    for microbatch, vmap_size in ((2, 1), (16, None)):
        fn = ost.microbatch_gradients(
            lambda w, x: jnp.mean(x @ w), 4, vmap_size=vmap_size, l1=True
        )
        tx = ost.estimate_noise_scale(norm="l1", scope="global")

        def step(state, key, fn=fn, tx=tx, rows=4 * microbatch):
            x = mean + sigma * jax.random.normal(key, (rows, 200))
            _, grads, moments = fn(jnp.ones(200), x)
            return tx.update(grads, state, moments=moments)[1], None

        def run(keys, step=step, tx=tx):
            return ost.metrics(jax.lax.scan(step, tx.init(jnp.ones(200)), keys)[0])

        keys = jax.random.split(jax.random.key(0), (200, 60))
        found = jax.jit(jax.vmap(run))(keys)
        low, high = found["noise_scale/low"], found["noise_scale/high"]
        within.append(float(jnp.mean((low <= 10) & (high >= 10))))
    # Four standard errors of a share of 0.95, of 200 runs.
    assert min(within) >= 0.95 - 4 * (0.95 * 0.05 / 200) ** 0.5


@functools.cache
def gradients(parts, vmap_size=1):
    def loss(params, x):
        return jnp.mean(jnp.square(x @ params["w"] + jnp.sum(params["v"])))

    return jax.jit(ost.microbatch_gradients(loss, parts, vmap_size=vmap_size, l1=True))


def after(norm, parts, x, factor=1.0, steps=6):
    tx = ost.estimate_noise_scale(norm=norm)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for i in range(steps):
        params = jax.tree.map(lambda p: p * factor, PARAMS)
        _, grads, moments = gradients(parts)(params, x[i])
        updates, state = update(grads, state, params, moments=moments)
        chex.assert_trees_all_equal(updates, grads)
    return state


BATCHES = np.random.default_rng(0).standard_normal((6, 8, 3)).astype("f4") + 1


def test_with_one_microbatch_there_is_no_estimate_and_with_two_there_is():
    none = ost.noise_scale(after("l1", 1, BATCHES))
    assert not none.valid
    assert none.steps == 0
    assert ost.noise_scale(after("l1", 2, BATCHES)).steps > 0


def test_the_l2_norm_is_what_it_is_without():
    tx = ost.estimate_noise_scale()
    with_l1, state = after("l2", 4, BATCHES), tx.init(PARAMS)
    for x in BATCHES:
        _, grads, moments = gradients(4)(PARAMS, x)
        moments = moments._replace(l1=None)
        state = jax.jit(tx.update)(grads, state, PARAMS, moments=moments)[1]
    chex.assert_trees_all_equal(state, with_l1)


def test_numbers_that_are_not_finite_leave_it_as_it_was():
    tx = ost.estimate_noise_scale(norm="l1")
    good, state = exact(SIGMA, SIGMA, 2), tx.init(PARAMS)
    for _ in range(4):
        state = tx.update(PARAMS, state, PARAMS, moments=good)[1]
    for bad in (np.nan, np.inf, -np.inf):
        for field in ("deviation", "agreement"):
            l1 = good.l1._replace(**{field: jnp.full(2, bad)})
            after = tx.update(PARAMS, state, PARAMS, moments=good._replace(l1=l1))[1]
            chex.assert_trees_all_equal(after.averages, state.averages)
            chex.assert_trees_all_equal(after.drift, state.drift)


def test_what_is_asked_amiss_is_named_with_its_remedy():
    for norm in ("L1", "linf", 1):
        with pytest.raises(ValueError, match=rf"norm={norm!r} is unknown.*'l2'.*'l1'"):
            ost.estimate_noise_scale(norm=norm)
    with pytest.raises(ValueError, match=r"difference=True .* norm='l2'"):
        ost.estimate_noise_scale(norm="l1", difference=True)
    tx = ost.estimate_noise_scale(norm="l1")
    moments = exact(SIGMA, SIGMA, 2)._replace(l1=None)
    with pytest.raises(ValueError, match=r"moments.l1, which is None; .* l1=True"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, moments=moments)
