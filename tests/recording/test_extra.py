"""A value of the user's own passes into metrics and history, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

PARAMS = {"w": jnp.ones(2)}
# By layer: as a model hands out its logits.
LOGITS = {"blocks/0": np.array([1.0, 2.0]), "blocks/1": np.array([3.0, 4.0])}


def run(values, name="accuracy", like=0.0):
    """The history of steps that are given these values."""
    tx = ost.record_history(
        optax.chain(ost.record_extra(name, like=like), optax.sgd(0.1)), length=8
    )
    step = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for value in values:
        _, state = step(PARAMS, state, PARAMS, **{name: value})
    return ost.history(state)


def test_a_number_is_a_column_of_the_history():
    kept = run([0.25, 0.5, jnp.float32(0.75)])
    np.testing.assert_array_equal(kept["extra/accuracy"], [0.25, 0.5, 0.75])


def test_a_tree_is_one_column_for_each_number():
    kept = run([LOGITS], "attention_logits", jax.tree.map(np.zeros_like, LOGITS))
    names = [f"extra/attention_logits/blocks/{i}/{j}" for i in (0, 1) for j in (0, 1)]
    assert [kept[name][0] for name in names] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("like", [np.zeros((2, 3)), jax.ShapeDtypeStruct((2, 3), int)])
def test_entries_of_an_array_are_named_by_their_indices(like):
    load = np.arange(6).reshape(2, 3)
    kept = run([load], "load", like)
    found = {key: x[0] for key, x in kept.items() if key.startswith("extra/")}
    assert found == {
        f"extra/load/{i}/{j}": load[i, j] for i in (0, 1) for j in range(3)
    }


def test_metrics_are_named_with_parameters_and_one_vector_without():
    tx = ost.record_extra("load", like=np.zeros(2))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, load=np.array([1, 2]))
    np.testing.assert_array_equal(ost.metrics(state)["extra/load/per_entry"], [1, 2])
    named = ost.metrics(state, params=PARAMS)
    assert named == {"extra/load/0": 1, "extra/load/1": 2}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_reported_in_its_step_alone(bad):
    kept = run([1.0, bad, 2.0])
    np.testing.assert_array_equal(kept["extra/accuracy"], [1.0, bad, 2.0])


def test_where_the_value_is_missing_the_last_one_stays():
    kept = run([1.0, None, 2.0])
    np.testing.assert_array_equal(kept["extra/accuracy"], [1.0, 1.0, 2.0])


def test_other_shapes_than_those_of_like_raise():
    tx = ost.record_extra("load", like={"a": np.zeros(2)})
    for wrong in ({"a": np.zeros(3)}, {"b": np.zeros(2)}, 1.0):
        with pytest.raises(ValueError, match=r"load has the shapes .* give like="):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, load=wrong)


@pytest.mark.parametrize("name", ["", "a b", 3])
def test_a_name_that_is_no_argument_raises(name):
    with pytest.raises(ValueError, match="must be a Python name"):
        ost.record_extra(name)


def test_a_tree_without_numbers_raises():
    with pytest.raises(ValueError, match="holds no number"):
        ost.record_extra("load", like={})
