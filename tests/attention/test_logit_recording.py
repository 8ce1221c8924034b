"""The recorder has the bounds of all heads, by name, now and then."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import HEADS, LAYOUTS, fused, fused_params

import optax_stability as ost


def kept(tx, params, steps=4, **extra_args):
    """The history of steps that double all parameters."""
    tx = ost.record_history(tx, length=8)
    step = jax.jit(tx.update, static_argnames="look")
    state = tx.init(params)
    for _ in range(steps):
        _, state = step(params, state, params, **extra_args)
        params = jax.tree.map(lambda x: 2 * x, params)
    return ost.history(state)


def bound(heads):
    return ost.attention_logit_bound(**heads._asdict())


def bounds(heads_of, params):
    """By name, head for head."""
    found = {}
    for name, heads in heads_of(params).items():
        values = jax.vmap(bound)(heads) if heads.query.ndim == 4 else bound(heads)
        for index in np.ndindex(*values.shape):
            found["/".join([name, *map(str, index)])] = values[index]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_head_of_every_layout_has_a_column(layout):
    heads_of, params = LAYOUTS[layout]
    history = kept(ost.record_logit_bound(heads_of), params, steps=1)
    known = bounds(heads_of, params)
    prefix = "attention/logit_bound/"
    found = {k.removeprefix(prefix): x for k, x in history.items() if prefix in k}
    assert found.keys() == known.keys()
    for name, value in known.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-5)
    largest = max(known.values())
    np.testing.assert_allclose(history["attention/logit_bound"], [largest], rtol=1e-5)


def test_it_measures_every_few_steps_and_keeps_the_value_in_between():
    history = kept(ost.record_logit_bound(fused, every=2), fused_params())
    first, second, third, fourth = history["attention/logit_bound"]
    assert first == second < third == fourth


@pytest.mark.parametrize(("look", "measured"), [(False, 0), (True, 4)])
def test_look_decides(look, measured):
    history = kept(ost.record_logit_bound(fused, every=3), fused_params(), look=look)
    assert len(set(history["attention/logit_bound"]) - {0}) == measured


def test_a_head_that_is_not_finite_is_reported_and_no_other():
    params = fused_params()
    params["qkv"]["kernel"][0, 0] = np.nan  # The first head's query.
    history = kept(ost.record_logit_bound(fused), params, steps=1)
    found = [history[f"attention/logit_bound/block/{i}"][0] for i in range(HEADS)]
    assert np.isnan(found).tolist() == [True, False, False, False]


def test_a_value_that_is_not_finite_does_not_stay():
    tx, params = ost.record_logit_bound(fused, every=1), fused_params()
    bad = jax.tree.map(lambda x: x * np.nan, params)
    _, state = tx.update(params, tx.init(params), bad)
    assert np.isnan(state.metrics["attention/logit_bound"])
    _, state = tx.update(params, state, params)
    assert np.isfinite(state.metrics["attention/logit_bound"])


def test_without_heads_there_is_no_metric():
    tx = ost.record_logit_bound(lambda params: {})
    params = {"w": np.ones(2, np.float32)}
    assert kept(tx, params).keys() == {"step"}
    # Orbax refuses arrays of size 0.
    assert all(leaf.size for leaf in jax.tree.leaves(tx.init(params)))


def test_without_parameters_it_raises():
    tx, params = ost.record_logit_bound(fused), fused_params()
    with pytest.raises(ValueError, match="pass params to update"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("heads_of", [None, "qkv"])
def test_heads_of_that_is_no_function_raises(heads_of):
    with pytest.raises(TypeError, match="must be a function from the parameters"):
        ost.record_logit_bound(heads_of)


@pytest.mark.parametrize("wrong", [None, {"block": (1, 2)}, {0: fused(fused_params())}])
def test_heads_of_that_returns_anything_else_raises(wrong):
    tx = ost.record_logit_bound(lambda params: wrong)
    with pytest.raises(TypeError, match="must return a dict from names to Att"):
        tx.init(fused_params())


def test_with_look_no_program_of_an_accelerator_has_a_condition():
    """A condition is what the host of a GPU waits for."""
    tx, params = ost.record_logit_bound(fused), fused_params()
    state = tx.init(params)
    for look in (True, False):
        step = jax.jit(lambda g, s, look=look: tx.update(g, s, g, look=look))
        text = step.trace(params, state).lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.while" not in text
        assert "stablehlo.case" not in text


def test_it_is_read_in_a_chain_with_other_metrics():
    params = fused_params()
    tx = optax.chain(ost.record("grad"), ost.record_logit_bound(fused))
    _, state = tx.update(params, tx.init(params), params)
    found = ost.metrics(state, params=params)
    assert {"grad/norm/out", "attention/logit_bound/block/3"} <= found.keys()
    assert jnp.isfinite(found["attention/logit_bound"])
