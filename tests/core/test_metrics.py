"""One reader for every optimizer state."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import struct
from tiers import full

import optax_stability as ost


@pytest.fixture
def params():
    return {"dense": {"bias": jnp.ones(2), "kernel": jnp.full((2, 2), 2.0)}}


def step(tx, params):
    return tx.update(params, tx.init(params), params)[1]


def test_a_state_without_ours_has_no_metrics(params):
    assert ost.metrics(step(optax.adamw(1e-3), params)) == {}
    assert ost.metrics(()) == {}


def test_vectors_become_scalars_by_leaf_name(params):
    state = step(optax.chain(ost.record("grad"), optax.sgd(1.0)), params)
    found = ost.metrics(state, params=params)
    assert float(found["grad/max_abs/dense/kernel"]) == 2.0
    assert float(found["grad/norm/dense/bias"]) == pytest.approx(2**0.5)
    assert not any(key.endswith("per_leaf") for key in found)


def test_a_mask_leaves_out_what_it_hides(params):
    is_matrix = jax.tree.map(lambda x: x.ndim > 1, params)
    state = step(optax.masked(ost.record("grad"), is_matrix), params)
    found = ost.metrics(state, params=params)
    assert float(found["grad/norm/dense/kernel"]) == 4.0
    assert "grad/norm/dense/bias" not in found


def test_a_mask_that_hides_a_whole_subtree_keeps_the_names_right(params):
    params = {"a": params, "b": params}
    state = step(optax.masked(ost.record("grad"), {"a": False, "b": True}), params)
    found = ost.metrics(state, params=params)
    assert "grad/norm/b/dense/kernel" in found
    assert "grad/norm/a/dense/kernel" not in found


@full
def test_two_states_with_one_key_are_told_apart_by_their_place(params):
    labels = {"dense": {"bias": "plain", "kernel": "decayed"}}
    tx = optax.partition(
        {
            "plain": ost.safe_adamw(1e-3, weight_decay=0.0),
            "decayed": ost.safe_adamw(1e-3),
        },
        labels,
    )
    found = ost.metrics(step(tx, params), params=params)
    assert {"plain/adam/update_rms", "decayed/adam/update_rms"} <= found.keys()
    assert "plain/adam/update_rms/dense/bias" not in found  # Only one state has it.
    assert "adam/update_rms/dense/bias" in found
    assert "adam/update_rms" not in found


def test_places_in_a_chain_are_numbers_and_in_a_named_chain_names(params):
    twice = ost.record("grad", per_leaf=False), ost.record("grad", per_leaf=False)
    found = ost.metrics(step(optax.chain(*twice), params))
    assert {"0/grad/norm", "1/grad/norm"} <= found.keys()
    named = optax.named_chain(("raw", twice[0]), ("out", twice[1]))
    found = ost.metrics(step(named, params))
    assert {"raw/grad/norm", "out/grad/norm"} <= found.keys()


class WrapperState(NamedTuple):
    """A user's own wrapper that reports, too."""

    count: jax.Array
    inner: Any

    reports_metrics = True

    @property
    def metrics(self):
        return {"mine/count": self.count}


def test_wrappers_of_your_own_are_read_and_so_is_what_they_wrap(params):
    inner = step(ost.record("grad"), params)
    found = ost.metrics((WrapperState(jnp.ones(()), inner),), params=params)
    assert {"mine/count", "grad/norm/dense/kernel"} <= found.keys()


def test_a_field_called_metrics_in_a_train_state_is_not_mistaken(params):
    @struct.dataclass
    class TrainState:
        metrics: Any
        opt_state: Any

    state = TrainState(metrics={"loss": 1.0}, opt_state=step(ost.record("g"), params))
    assert {"g/norm", "g/norm/per_leaf"} <= ost.metrics(state).keys()


class ForeignState(NamedTuple):
    """A state of another library, with a field of that name."""

    metrics: Any
    inner: Any


class ForeignProperty(NamedTuple):
    """A state of another library, with a property of that name."""

    inner: Any

    @property
    def metrics(self):
        raise AssertionError("it was read")


@pytest.mark.parametrize("theirs", [None, jnp.ones(2), {"loss": jnp.ones(())}, "x"])
def test_a_foreign_state_with_a_field_called_metrics_is_left_alone(params, theirs):
    found = ost.metrics(ForeignState(theirs, step(ost.record("g"), params)))
    assert "g/norm" in found
    assert "loss" not in found
    assert "g/norm" in ost.metrics(ForeignProperty(step(ost.record("g"), params)))


@full
def test_inside_and_outside_jit_agree(params):
    tx = optax.chain(ost.record("grad"), ost.clip_by_zscore(), ost.safe_adamw(1e-3))
    state = step(tx, params)
    inside = jax.jit(lambda state, p: ost.metrics(state, params=p))(state, params)
    chex.assert_trees_all_close(inside, ost.metrics(state, params=params), rtol=1e-6)


def test_what_follows_from_the_state_costs_nothing_unless_it_is_used(params):
    def norm_only(state):
        return ost.metrics(state)["grad/norm"]

    tx = optax.chain(ost.record("grad"), ost.safe_adamw(1e-3))
    state = step(tx, params)
    compiled = jax.jit(norm_only).lower(state).compile()
    assert compiled.cost_analysis().get("flops", 0.0) == 0.0


def test_other_parameters_are_refused_by_name(params):
    state = step(ost.record("grad"), params)
    with pytest.raises(ValueError, match=r"no leaf 'dense/bias'.*RecordState"):
        ost.metrics(state, params={"conv": jnp.ones(2)})
