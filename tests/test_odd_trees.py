"""Trees that are no dicts of float arrays: each works, or one error names the leaf."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core
from test_contract import CASES, FEW, ONE_EACH, make_grads, make_params
from tiers import quick_only

import optax_stability as ost

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# --- containers ------------------------------------------------------------------


class Dense(NamedTuple):
    bias: Any
    kernel: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """As an Equinox module: arrays, and static fields that are no leaves."""

    dense: Dense
    scale: Any
    activation: Callable = dataclasses.field(metadata={"static": True})


def module(tree):
    return Module(Dense(**tree["dense"]), tree["scale"], jax.nn.relu)


CONTAINERS = {
    "FrozenDict": core.freeze,
    "dataclass": module,
    "tuples and lists": lambda tree: (list(tree["dense"].values()), tree["scale"]),
    "None among them": lambda tree: {**tree, "unused": None},
    "masked nodes": lambda tree: {**tree, "hidden": optax.MaskedNode()},
    "empty subtrees": lambda tree: {**tree, "unused": {}, "zzz": ()},
}


def program(tx, tree):
    """A step as a program of the leaves, and the structure of what it returns."""
    leaves, treedef = jax.tree.flatten(tree)
    structure = []

    def step(*leaves):
        params = jax.tree.unflatten(treedef, leaves)
        updates, state = tx.update(params, tx.init(params), params)
        structure.append(jax.tree.structure(updates))
        return jax.tree.leaves((updates, state))

    return jax.make_jaxpr(step)(*leaves), structure[0]


@every_case
@pytest.mark.parametrize("name", CONTAINERS)
@quick_only(*(f"{name}-{case}" for name in CONTAINERS for case in FEW))
def test_a_step_does_not_depend_on_the_containers(case, name):
    plain, other = make_params(), CONTAINERS[name](make_params())
    expected, _ = program(case.make(), plain)
    found, structure = program(case.make(), other)
    assert structure == jax.tree.structure(other)
    assert len(found.eqns) == len(expected.eqns)
    assert [v.aval for v in found.jaxpr.outvars] == [
        v.aval for v in expected.jaxpr.outvars
    ]


@every_case
@pytest.mark.parametrize("name", CONTAINERS)
def test_leaves_of_every_container_have_names(case, name):
    tx, params = case.make(), CONTAINERS[name](make_params())
    found = jax.eval_shape(lambda: ost.metrics(tx.init(params), params=params))
    assert not any(key.endswith("/per_leaf") for key in found)


def trace(tx, grads, params):
    """Updates and state after a traced step, and the error in place of both."""
    try:
        step = jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))
    except (TypeError, ValueError) as error:
        return None, None, str(error)
    return *step, ""


# --- leaves ----------------------------------------------------------------------

PLAIN = {"a": jnp.float32(1.5), "w": jnp.array([3.0, -4.0])}
LEAVES = {
    "NumPy": {"a": np.float32(1.5), "w": np.array([3.0, -4.0], np.float32)},
    "NumPy float64": {"a": np.float64(1.5), "w": np.array([3.0, -4.0])},
    "plain numbers": {"a": 1.5, "w": jnp.array([3.0, -4.0])},
}


@every_case
@pytest.mark.parametrize("name", LEAVES)
@quick_only(*(f"NumPy-{case}" for case in ONE_EACH), "plain numbers-safe_adamw")
def test_numbers_and_numpy_arrays_are_arrays(case, name):
    tx, given = case.make(), LEAVES[name]

    def step(grads):
        return tx.update(grads, tx.init(grads), grads)

    found = jax.eval_shape(lambda: step(given))
    expected = jax.eval_shape(lambda: step(PLAIN))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("case", ["clip_by_threshold", "safe_adamw"])
def test_numpy_gradients_give_the_same_numbers(case, name):
    tx = CASES[case].make()
    state, given = tx.init(PLAIN), LEAVES[name]
    # The gradients are constants of the programs, not their arguments.
    expected = jax.jit(lambda: tx.update(PLAIN, state, PLAIN)[0])()
    found = jax.jit(lambda: tx.update(given, state, given)[0])()
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(x, y)


@every_case
@quick_only(*FEW, "safe_adamw")
def test_a_leaf_of_size_zero_changes_nothing(case):
    params = make_params() | {"empty": jnp.zeros((0, 3))}
    tx = case.make()
    step = jax.jit(tx.update)
    state = tx.init(params)
    for seed in range(2):
        grads = make_grads(seed, make_params()) | {"empty": jnp.zeros((0, 3))}
        updates, state = step(grads, state, params)
    assert updates["empty"].shape == (0, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    reported = ost.metrics(state, params=params)
    assert not any(np.isnan(v).any() for k, v in reported.items() if k in KNOWN)


KNOWN = ("adam/update_rms", "clip/norm", "skip/norm", "grad/norm", "grad/rms")


@every_case
def test_integers_pass_or_are_named(case):
    """What would have to scale integers refuses them, by the name of the leaf."""
    params = make_params() | {"table": jnp.arange(3)}
    updates, _, said = trace(case.make(), params, params)
    if said:
        assert "int32 in the leaf 'table'" in said
        return
    assert case.can_be_inactive
    assert updates["table"].dtype == jnp.int32


ODD = {
    "function": (jax.nn.relu, "a custom_jvp"),
    "text": ("relu", "a str"),
    "random key": (jax.eval_shape(jax.random.key, 0), "a random key"),
    "float0": (np.zeros(3, jax.dtypes.float0), "float0"),
}


@every_case
@pytest.mark.parametrize("odd", ODD)
@quick_only(*(f"{odd}-{case}" for odd in ODD for case in FEW))
def test_what_is_no_number_is_named_with_a_remedy(case, odd):
    leaf, word = ODD[odd]
    params = make_params()
    grads = params | {"odd": leaf}
    tx = case.make()
    with pytest.raises(TypeError, match="'odd'") as raised:
        jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))
    assert word in str(raised.value)
    assert "eqx.filter" in str(raised.value)
    with pytest.raises(TypeError, match="'odd'"):
        tx.init(grads)


@every_case
def test_a_missing_gradient_passes_or_is_named(case):
    """None in place of an array that was there at init."""
    params = make_params()
    grads = params | {"scale": None}
    tx = case.make()
    updates, state, said = trace(tx, grads, params)
    if said:
        assert "'scale'" in said
        return
    assert updates["scale"] is None
    fresh = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)


def test_the_error_of_adamw_names_leaf_and_dtype():
    with pytest.raises(TypeError, match="int32 in the leaf 'w'"):
        ost.safe_adamw(1e-2).init({"w": jnp.ones(3, jnp.int32)})
