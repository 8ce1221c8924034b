"""Leaf names: one per leaf, with or without arrays."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optax_stability as ost
from optax_stability._core import _tree


class Layer(NamedTuple):
    kernel: Any
    bias: Any


class Block(nnx.Module):
    """Two layers in a list, and a statistic that is no parameter."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"dense": {"kernel": 1.0, "bias": 2.0}}, ["dense/bias", "dense/kernel"]),
        ({"blocks": [{"w": 1.0}, {"w": 2.0}]}, ["blocks/0/w", "blocks/1/w"]),
        ((1.0, [2.0]), ["0", "1/0"]),
        (Layer(1.0, {"scale": 2.0}), ["kernel", "bias/scale"]),
        (1.0, ["params"]),
        ({"a": None, "b": 1.0, "c": {"d": None}}, ["b"]),
        ({}, []),
        (None, []),
        ({"a": {}, "b": ()}, []),
        ({1: 1.0, 2: 2.0}, ["1", "2"]),
        ({"a/b": 1.0, "c": 2.0}, ["a/b", "c"]),
        (
            {"a/b": 1.0, "a": {"b": 2.0}, "c": 3.0},
            ["['a']['b']", "['a/b']", "['c']"],
        ),
        ({"": 1.0, "params": 2.0}, ["['']", "['params']"]),
    ],
    ids=[
        "dict",
        "list",
        "tuple",
        "NamedTuple",
        "bare array",
        "None has no name",
        "empty dict",
        "None",
        "empty containers",
        "integer keys",
        "a slash that is no trouble",
        "a slash that would give one name twice",
        "an empty key beside the name of a bare array",
    ],
)
def test_leaves_are_named_by_their_path_in_leaf_order(tree, names):
    tree = jax.tree.map(jnp.asarray, tree)
    assert ost.leaf_names(tree) == names
    assert len(names) == len(jax.tree.leaves(tree))
    shapes = jax.eval_shape(lambda: tree)
    assert ost.leaf_names(shapes) == names


def test_an_nnx_state_its_pure_copy_and_its_shapes_have_the_same_names():
    model = Block(nnx.Rngs(0))
    names = [
        "layers/0/bias",
        "layers/0/kernel",
        "layers/1/bias",
        "layers/1/kernel",
        "norm/bias",
        "norm/scale",
    ]
    state = nnx.state(model, nnx.Param)
    assert ost.leaf_names(state) == names
    assert ost.leaf_names(nnx.to_pure_dict(state)) == names
    assert ost.leaf_names(nnx.eval_shape(lambda: nnx.state(model, nnx.Param))) == names


def test_an_nnx_module_has_the_names_of_all_its_variables():
    names = ost.leaf_names(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert names == ["bias", "kernel"]


def test_marks_keep_the_names_and_no_arrays():
    tree = {"a": [jnp.ones(3), jnp.ones(2)], "b": None, "c": Layer(jnp.ones(1), None)}
    marks = _tree.mark_leaves(tree)
    assert jax.tree.leaves(marks) == []
    assert (
        _tree.names_of_marks(marks)
        == ost.leaf_names(tree)
        == ["a/0", "a/1", "c/kernel"]
    )


def test_marks_survive_jit_and_a_change_of_structure_is_seen():
    tree = {"a": jnp.ones(3), "b": jnp.ones(2)}
    marks = jax.jit(_tree.mark_leaves)(tree)
    assert _tree.names_of_marks(marks) == ["a", "b"]
    chex.assert_trees_all_equal_structs(marks, _tree.mark_leaves(tree))
    other = _tree.mark_leaves({"a": jnp.ones(3)})
    assert jax.tree.structure(marks) != jax.tree.structure(other)


# --- pure ------------------------------------------------------------------------


def test_pure_takes_the_values_out_of_variables_at_any_depth():
    variable = nnx.Param(jnp.arange(3.0))
    tree = {"a": variable, "b": [jnp.ones(2), nnx.BatchStat(jnp.zeros(1))]}
    expected = {"a": jnp.arange(3.0), "b": [jnp.ones(2), jnp.zeros(1)]}
    found = _tree.pure(tree)
    chex.assert_trees_all_equal(found, expected)
    assert not any(
        _tree.is_variable(leaf)
        for leaf in jax.tree.leaves(found, is_leaf=_tree.is_variable)
    )


def test_pure_leaves_other_trees_alone():
    tree = {"a": jnp.ones(3), "b": (jnp.zeros(2), None)}
    found = _tree.pure(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert found["a"] is tree["a"]
    assert found["b"][0] is tree["b"][0]
