"""What passes is reported as it is, and passes as it is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_stability as ost

# Norms are sums of a few float32 products.
RTOL = 1e-6


def measure(grads, **kwargs):
    tx = ost.record("grad", **kwargs)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal(updates, grads)
    return state.metrics


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norm_rms_and_largest_entry_are_numpys(dtype):
    a = jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype)
    b = (100 * jax.random.normal(jax.random.key(1), (7,))).astype(dtype)
    found = measure({"a": a, "b": b})
    leaves = [np.asarray(x, np.float64).ravel() for x in (a, b)]
    for leaves_of, suffix in (([np.concatenate(leaves)], ""), (leaves, "/per_leaf")):
        expected = {
            "norm": [np.linalg.norm(x) for x in leaves_of],
            "rms": [np.sqrt(np.mean(x**2)) for x in leaves_of],
            "max_abs": [np.abs(x).max() for x in leaves_of],
        }
        for key, value in expected.items():
            got = np.ravel(found[f"grad/{key}{suffix}"])
            np.testing.assert_allclose(got, value, rtol=RTOL)


def test_a_nan_is_reported_where_it_is_and_forgotten_next_step():
    tx = ost.record("grad")
    good = {"a": jnp.ones(3), "b": jnp.ones(3)}
    bad = {"a": jnp.array([1.0, jnp.nan, 1.0]), "b": jnp.ones(3)}
    _, state = tx.update(bad, tx.init(good))
    assert np.isnan(state.metrics["grad/norm"])
    assert np.isnan(state.metrics["grad/norm/per_leaf"]).tolist() == [True, False]
    _, state = tx.update(good, state)
    chex.assert_tree_all_finite(state.metrics)


def test_a_norm_whose_square_overflows_is_reported_right():
    found = measure({"a": jnp.array([3e20, 4e20])})
    np.testing.assert_allclose(found["grad/norm"], 5e20, rtol=RTOL)
    np.testing.assert_allclose(found["grad/max_abs"], 4e20, rtol=RTOL)


def test_empty_trees_and_leaves_measure_zero():
    assert float(measure({})["grad/norm"]) == 0.0
    found = measure({"a": jnp.zeros((0, 3)), "b": jnp.ones(4)})
    assert found["grad/rms/per_leaf"].tolist() == [0.0, 1.0]
    assert found["grad/max_abs/per_leaf"].tolist() == [0.0, 1.0]


def test_vectors_can_be_left_out():
    keys = measure({"a": jnp.ones(2)}, per_leaf=False).keys()
    assert keys == {"grad/norm", "grad/rms", "grad/max_abs"}


@pytest.mark.parametrize("name", ["", 3])
def test_the_name_must_be_a_string(name):
    with pytest.raises(ValueError, match=f"name={name!r} must be a non-empty string"):
        ost.record(name)
