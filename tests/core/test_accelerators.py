"""What is computed without asking on an accelerator is what a CPU computes if asked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import quick_only

import optax_stability as ost
from optax_stability._core import _norms


@pytest.fixture
def accelerator(monkeypatch):
    """Takes the other side of every fork between platforms."""

    def switch():
        monkeypatch.setattr(
            jax.lax,
            "platform_dependent",
            lambda *args, cpu, default: default(*args),
        )

    return switch


def fresh(function):
    """The same function, as one that was never traced."""
    return lambda *args: function(*args)


def step(grads, state):
    return RECORD.update(grads, state)


RECORD = ost.record("grad")
BATCH = jnp.arange(8.0).reshape(4, 2)


def gradients(scale):
    def loss_fn(params, x):
        return scale * jnp.mean((x @ params["w"]) ** 2) + jnp.sum(params["b"] * x)

    fn = ost.microbatch_gradients(loss_fn, 2, vmap_size=1)
    return fn({"w": jnp.ones(2), "b": jnp.ones(2)}, BATCH)


@pytest.mark.parametrize(
    "value", [1.0, 0.0, 1e-25, 3e9, 1e15, 1e38, np.inf, -np.inf, np.nan]
)
@quick_only("nan")
def test_norms_and_counts_are_the_same(accelerator, value):
    grads = {"a": jnp.full((3, 5), value), "b": jnp.array([2.0, value, -1.0])}
    grads["c"] = jnp.ones(4)
    state = RECORD.init(grads)
    expected = jax.jit(fresh(step))(grads, state)
    tangent = jax.jvp(_norms.global_norm, (grads,), (grads,))
    accelerator()
    chex.assert_trees_all_equal(jax.jit(fresh(step))(grads, state), expected)
    chex.assert_trees_all_close(
        jax.jvp(_norms.global_norm, (grads,), (grads,)), tangent, rtol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38, np.nan])
@quick_only("nan")
def test_microbatches_are_kept_or_left_out_as_on_cpu(accelerator, scale):
    expected = jax.jit(fresh(gradients))(scale)
    accelerator()
    chex.assert_trees_all_equal(jax.jit(fresh(gradients))(scale), expected)
