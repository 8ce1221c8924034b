"""Constant factors by leaf name, and what Adam sees of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full

import optax_stability as ost

PARAMS = {
    "embed": {"tokens": jnp.ones(3), "positions": jnp.ones(2)},
    "head": jnp.ones((2, 2)),
}


def scaled(factors, grads=PARAMS):
    tx = ost.scale_gradients(factors)
    return tx.update(grads, tx.init(grads))[0]


def test_the_first_pattern_found_in_the_name_decides():
    updates = scaled({"tokens$": 0.25, "^embed/": 0.5})
    np.testing.assert_array_equal(updates["embed"]["tokens"], 0.25)
    np.testing.assert_array_equal(updates["embed"]["positions"], 0.5)
    assert updates["head"] is PARAMS["head"]


def test_a_factor_of_zero_gives_zeros_whatever_the_gradient():
    grads = PARAMS | {"head": jnp.full((2, 2), jnp.nan)}
    np.testing.assert_array_equal(scaled({"head": 0.0}, grads)["head"], 0.0)


def test_the_dtype_stays():
    grads = {"w": jnp.ones(2, jnp.bfloat16)}
    assert scaled({"w": 0.1}, grads)["w"].dtype == jnp.bfloat16


def test_it_is_the_shrink_of_glm_130b():
    alpha, x = 0.1, jnp.arange(3.0)

    def loss(e):
        e = e * alpha + jax.lax.stop_gradient(e) * (1 - alpha)
        return jnp.sum(jnp.sin(e) * x)

    plain = jax.grad(lambda e: jnp.sum(jnp.sin(e) * x))(jnp.ones(3))
    shrunk = jax.grad(loss)(jnp.ones(3))
    found = scaled({"embed": alpha}, {"embed": plain})["embed"]
    np.testing.assert_allclose(found, shrunk, rtol=1e-6)


@full
def test_an_adam_without_epsilon_cancels_the_factor_and_a_clip_does_not():
    def first_update(*first):
        tx = optax.chain(*first, ost.scale_by_safe_adam())
        return jax.jit(lambda g, s: tx.update(g, s))(PARAMS, tx.init(PARAMS))[0]

    shrink = ost.scale_gradients({"embed": 0.125})
    chex.assert_trees_all_equal(first_update(shrink), first_update())
    clip = ost.clip_by_threshold(ost.thresholds.constant(1.0))
    tx = optax.chain(shrink, clip)
    clipped, _ = tx.update(PARAMS, tx.init(PARAMS))
    alone, _ = clip.update(PARAMS, clip.init(PARAMS))
    assert float(clipped["head"][0, 0]) > float(alone["head"][0, 0])


def test_a_pattern_that_matches_nothing_raises_and_lists_the_leaves():
    with pytest.raises(ValueError, match=r"'emebd'.*embed/positions, embed/tokens"):
        ost.scale_gradients({"emebd": 0.1}).init(PARAMS)


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ({"w": -1.0}, ValueError, r"factors\['w'\]=-1\.0"),
        ({"w": "0.1"}, TypeError, r"factors\['w'\]"),
        ({"(": 0.1}, ValueError, r"'\(', which is not a regular expression"),
        (0.1, TypeError, "factors must map patterns to numbers, got 0.1"),
    ],
)
def test_bad_factors_raise_by_name(factors, error, message):
    with pytest.raises(error, match=message):
        ost.scale_gradients(factors)
