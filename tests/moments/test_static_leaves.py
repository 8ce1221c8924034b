"""Parameters in a module that holds more than arrays, as Equinox treats them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_stability as ost
from optax_stability._moments._differentiable import split_static


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module in the manner of Equinox: every field is a part of the tree."""

    weight: Any
    activation: Callable = jnp.tanh
    name: str = "layer"
    rate: float = 0.5
    table: Any = None
    bias: Any = None

    def __call__(self, x):
        return self.activation(x @ self.weight) * self.rate + self.table


MODULE = Module(jnp.arange(1.0, 4.0), table=jnp.array(2, jnp.int32))
BATCH = jnp.array([[1.0, 0.0, 0.5], [3.0, 1.0, 0.0], [0.1, 0.2, 0.3], [1.0, 1.0, 2.0]])


def loss_fn(module, x):
    assert module.name == "layer"
    assert module.rate == 0.5
    return jnp.mean(module(x) ** 2)


def plain_loss(weight, x):
    return loss_fn(dataclasses.replace(MODULE, weight=weight), x)


@pytest.mark.parametrize("vmap_size", [None, 2, 1])
def test_static_leaves_reach_the_loss_and_have_no_gradient(vmap_size):
    make = ost.microbatch_gradients
    fn = make(loss_fn, 4, vmap_size=vmap_size, mean_square=True)
    plain = make(plain_loss, 4, vmap_size=vmap_size, mean_square=True)
    # As in eqx.filter_jit: what is no array belongs to the program.
    step = jax.jit(lambda w, x: fn(dataclasses.replace(MODULE, weight=w), x))
    loss, grads, moments = step(MODULE.weight, BATCH)
    expected = jax.jit(plain)(MODULE.weight, BATCH)
    chex.assert_trees_all_equal((loss, grads.weight), expected[:2])
    np.testing.assert_array_equal(moments.deviation, expected[2].deviation)
    chex.assert_trees_all_equal(
        moments.mean_square.weight, jnp.asarray(expected[2].mean_square)
    )
    assert [grads.activation, grads.name, grads.rate, grads.table] == [None] * 4
    assert ost.leaf_names(grads) == ["weight"]


def test_a_loss_scale_and_aux_work_as_well():
    fn = ost.microbatch_gradients(lambda m, x: (loss_fn(m, x), m.rate), 2, has_aux=True)
    (loss, aux), grads, _ = fn(MODULE, BATCH, loss_scale=2.0**10)
    (same, _), expected, _ = fn(MODULE, BATCH)
    assert (loss, aux.shape) == (same, (2,))
    np.testing.assert_array_equal(grads.weight, expected.weight)


def test_a_tree_of_floats_stays_as_it_is():
    tree = {"w": MODULE.weight, "z": jnp.zeros(2, jnp.complex64)}
    split, join = split_static(tree)
    assert split is tree
    assert join(tree) is tree


@pytest.mark.parametrize("params", [{"w": jnp.arange(3)}, {"f": jnp.tanh}, 1.0])
def test_nothing_to_differentiate_raises(params):
    fn = ost.microbatch_gradients(lambda p, x: jnp.mean(x), 2)
    with pytest.raises(ValueError, match="nothing to differentiate; give the param"):
        fn(params, BATCH)
