"""A conditional step that needs no second buffer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

import optax_stability as ost
from optax_stability._core._in_place import (
    apply_if,
    depends_on,
    exchange_if,
    measure_if,
    run_if,
    write_if,
)

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


BUFFERS = {
    "f32": jnp.array([1.5, -2.0, jnp.nan]),
    "bf16": jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3),
    "int": jnp.array([3, 4]),
}
STATE = {"count": jnp.int32(7), "trace": jnp.array([0.5, jnp.inf])}


def inner_update(buffers, state):
    """Some updates are as wide as their buffers, one is wider, one is narrower."""
    updates = {
        "f32": (2 * buffers["f32"] + state["trace"][0]).astype(jnp.bfloat16),
        "bf16": 3 * buffers["bf16"].astype(jnp.float32),
        "int": -buffers["int"],
    }
    return updates, {"count": state["count"] + 1, "trace": -state["trace"]}


def nothing(buffers, state):
    updates, _ = jax.eval_shape(inner_update, buffers, state)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), updates), state


@jax.jit
def updated_by_cond(run, buffers, state):
    return jax.lax.cond(run, inner_update, nothing, buffers, state)


@pytest.mark.parametrize("run", [True, False])
def test_an_update_in_place_is_that_of_a_conditional(run):
    applied = jax.jit(lambda *args: apply_if(args[0], inner_update, *args[1:]))
    updates, buffers, state = applied(run, BUFFERS, STATE)
    chex.assert_trees_all_equal((updates, state), updated_by_cond(run, BUFFERS, STATE))
    chex.assert_trees_all_equal_shapes_and_dtypes(buffers, BUFFERS)
    # What is wider than its buffer is not written over it.
    chex.assert_trees_all_equal(buffers["bf16"], BUFFERS["bf16"])
    written = updates["f32"].astype(jnp.float32) if run else BUFFERS["f32"]
    np.testing.assert_array_equal(buffers["f32"], written)


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_what_is_written_is_used_or_is_zeros(run, used):
    """A second step may use the buffers though the first one did not run."""

    @jax.jit
    def step(run, used):
        written, state = write_if(run, inner_update, BUFFERS, STATE)
        targets = jax.tree.map(lambda x: x + x, written.targets)
        return written._replace(targets=targets).updates(used), state

    updates, state = step(run, used)
    expected, expected_state = updated_by_cond(run, BUFFERS, STATE)
    chex.assert_trees_all_equal(state, expected_state)
    if not used:
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    elif run:
        chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: x + x, expected))
    else:
        np.testing.assert_array_equal(updates["int"], 2 * BUFFERS["int"])


@pytest.mark.parametrize("run", [True, False])
def test_an_exchange_is_that_of_a_conditional_bit_for_bit(run):
    first = BUFFERS | {"key": jax.random.key(0), "flag": jnp.array([True, False])}
    second = jax.tree.map(lambda x: x, first) | {
        "f32": jnp.array([-0.0, jnp.inf, 1e-45]),
        "int": jnp.array([-1, 2**31 - 1]),
        "key": jax.random.key(1),
        "flag": jnp.array([False, False]),
    }

    def exchanged(run, a, b):
        return exchange_if(run, a, b)

    def by_cond(run, a, b):
        return jax.lax.cond(run, lambda a, b: (b, a), lambda a, b: (a, b), a, b)

    def bits(tree):
        data = jax.random.key_data(tree.pop("key")) if "key" in tree else ()
        return data, jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)

    for names in (BUFFERS.keys() | {"flag"}, first.keys()):
        a, b = ({name: tree[name] for name in names} for tree in (first, second))
        found = jax.jit(exchanged)(run, a, b)
        expected = jax.jit(by_cond)(run, a, b)
        for one, other in zip(found, expected, strict=True):
            chex.assert_trees_all_equal(bits(dict(one)), bits(dict(other)))


@pytest.mark.parametrize("run", [True, False])
def test_a_measurement_is_that_of_a_conditional_and_lets_derivatives_pass(run):
    def measure(tree, extra, last):
        return {"sum": last["sum"] + extra * jnp.sum(tree["a"]), "count": last["count"]}

    last = {"sum": jnp.float32(1.0), "count": jnp.int32(2)}

    def by_loop(tree):
        return measure_if(jnp.array(run), measure, tree, jnp.float32(3.0), last)

    def by_cond(tree):
        taken = jax.lax.cond(run, measure, lambda *args: last, tree, 3.0, last)
        return tree, taken

    chex.assert_trees_all_equal(jax.jit(by_loop)(TREE), jax.jit(by_cond)(TREE))
    gradient = jax.jit(jax.grad(lambda tree: jnp.sum(by_loop(tree)[0]["a"] ** 2)))
    chex.assert_trees_all_equal(
        gradient(TREE), {"a": 2 * TREE["a"], "b": 0 * TREE["b"]}
    )


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of older versions copies more"
)
@full
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


@pytest.mark.parametrize("measured", [1.0, 0.0, -1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("run", [True, False])
def test_a_dependency_does_not_depend_on_the_values(run, measured):
    values = jnp.full(3, measured)
    assert bool(depends_on(jnp.asarray(run), values, values)) == run
