"""Safe AdamW: optax.adamw with safe Adam inside, argument by argument."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost

# optax forms 1 − β₂ᵗ in float32, 6e-8 of 1e-3 off at the first steps and half of it in
# the root. It enters updates of size 1.
ROUNDING = 1e-4
# A product and a sum or two in float32.
EXACT = 1e-6

PARAMS = {"dense": {"kernel": np.full((3, 2), 2.0, "f4"), "bias": np.ones(2, "f4")}}


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def train(tx, steps=60):
    """The parameters after some steps on random gradients."""
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: rng.standard_normal(p.shape, "f4"), PARAMS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-2},
        {"learning_rate": optax.cosine_decay_schedule(1e-2, 50)},
        {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.95, "weight_decay": 0.1},
        {"learning_rate": 1e-2, "weight_decay": 0.1, "mask": is_kernel},
    ],
    ids=["defaults", "schedule", "betas and decay", "mask"],
)
def test_it_trains_like_adamw_of_optax(settings):
    expected = train(optax.adamw(**settings, eps=1e-8))
    found = train(ost.safe_adamw(**settings, eps=1e-8))
    # Sixty steps of 1e-2 move a parameter by 0.6 at most.
    chex.assert_trees_all_close(found, expected, atol=0.6 * ROUNDING)
    moved = jax.tree.map(lambda p, q: np.abs(p - q).max() > 1e-3, PARAMS, found)
    assert all(jax.tree.leaves(moved))


def test_one_step_by_hand():
    params = {"w": np.array([1.0, -2.0, 3.0], "f4")}
    grads = {"w": np.array([1e-30, 5.0, 0.0], "f4")}
    tx = ost.safe_adamw(0.1, weight_decay=0.5)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    # −0.1·(sign(g) + 0.5·p); the coordinate without a gradient only decays.
    expected = {"w": np.array([-0.15, -0.0, -0.15], "f4")}
    chex.assert_trees_all_close(updates, expected, rtol=EXACT, atol=EXACT)


def computation(tx):
    """What init and update compute, as text."""
    state = jax.eval_shape(tx.init, PARAMS)
    update = jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
    return str(jax.make_jaxpr(tx.init)(PARAMS)), str(update)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"b1": 0.8},
        {"b2": 0.95},
        {"eps": 1e-6},
        {"eps": lambda step: 1.0 / (1 + step.astype(jnp.float32))},
        {"eps": 1e-6, "eps_mode": "max"},
        {"eps_mode": "atan2"},
        {"update_rms_max": 1.0},
        {"spike_ratio": 5000.0},
        {"mu_dtype": jnp.bfloat16},
        {"rms_dtype": jnp.bfloat16},
        {"weight_decay": 0.1},
        {"mask": is_kernel(PARAMS)},
    ],
    ids=" ".join,
)
def test_every_option_is_passed_on(options):
    adam = dict(options)
    decay = adam.pop("weight_decay", 1e-4), adam.pop("mask", None)
    composed = optax.chain(
        ost.scale_by_safe_adam(**adam),
        optax.add_decayed_weights(*decay),
        optax.scale_by_learning_rate(0.1),
    )
    found = computation(ost.safe_adamw(0.1, **options))
    assert found == computation(composed)
    if options:
        assert found != computation(ost.safe_adamw(0.1))


def test_the_first_arguments_are_those_of_adamw_in_the_same_order():
    by_place = ost.safe_adamw(0.1, 0.8, 0.95, 1e-6)
    by_name = ost.safe_adamw(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-6)
    assert computation(by_place) == computation(by_name)


def test_without_eps_parameters_without_gradients_only_decay():
    params = {"w": np.array([1.0, 2.0], "f4")}
    tx = ost.safe_adamw(0.1, weight_decay=0.01)
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = jax.tree.map(np.zeros_like, params)
    for _ in range(3):
        updates, state = update(zeros, state, params)
        expected = {"w": -0.1 * 0.01 * params["w"]}
        chex.assert_trees_all_close(updates, expected, rtol=EXACT)


def test_a_gradient_that_is_not_finite_moves_nothing_but_finite_amounts():
    tx = ost.safe_adamw(0.1)
    state, update, params = tx.init(PARAMS), jax.jit(tx.update), PARAMS
    for bad in (np.nan, np.inf, 1.0, -np.inf, 1.0):
        grads = jax.tree.map(lambda p, bad=bad: np.full_like(p, bad), PARAMS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite((params, state))


def test_its_metrics_are_found_in_the_chain():
    tx = ost.safe_adamw(0.1)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    found = ost.metrics(state, params=PARAMS)
    assert float(found["adam/update_rms"]) == pytest.approx(1.0, rel=EXACT)
    assert set(found) >= {"adam/update_rms/dense/kernel", "adam/update_rms/dense/bias"}


def test_the_weight_decay_needs_parameters_and_says_so():
    tx = ost.safe_adamw(0.1)
    with pytest.raises(ValueError, match="params"):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("name", "value"), [("b1", 1.0), ("b2", 1.0), ("eps", -1.0), ("eps_mode", "sum")]
)
def test_a_bad_argument_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=name) as raised:
        ost.safe_adamw(0.1, **{name: value})
    assert f"{name}={value!r}" in str(raised.value)
