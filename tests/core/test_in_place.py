"""A conditional step that needs no second buffer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_stability as ost
from optax_stability._core._in_place import run_if

TREE = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}


def double(tree):
    return jax.tree.map(lambda x: 2 * x, tree)


@pytest.mark.parametrize("run", [True, False])
def test_it_runs_once_or_not_at_all(run):
    found = jax.jit(lambda run: run_if(run, double, TREE))(run)
    chex.assert_trees_all_equal(found, double(TREE) if run else TREE)


def test_each_of_a_batch_decides_for_itself():
    run = jnp.array([True, False, True])
    values = jnp.array([1.0, jnp.nan, 3.0])
    found = jax.vmap(lambda r, x: run_if(r, lambda y: 2 * y, x))(run, values)
    np.testing.assert_array_equal(found, [2.0, np.nan, 6.0])


def test_what_is_not_run_raises_no_nan():
    def poison(x):
        return x / 0 * jnp.nan

    np.testing.assert_array_equal(run_if(jnp.array(False), poison, jnp.ones(2)), 1.0)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of older versions copies more"
)
def test_a_guard_needs_no_buffer_but_the_gradient_s_own():
    params = {str(i): jnp.ones((128, 256)) for i in range(4)}
    tx = ost.spike_guard(ost.safe_adamw(1e-3))

    def step(params, state, x):
        def loss_fn(params):
            return sum(jnp.mean(jnp.tanh(x @ w) ** 2) for w in params.values())

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return jax.tree.map(jnp.add, params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, tx.init(params), jnp.ones((4, 128))
    )
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    gradient = sum(x.nbytes for x in params.values())
    assert temp < 1.25 * gradient
