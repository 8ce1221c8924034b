"""The state of safe Adam: what its metrics mean, and the way from and to optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full, quick_only

import optax_stability as ost
from optax_stability._adam._state import update_bound

# A mean of a few float32 quotients.
ROUNDING = 1e-6
# optax forms 1 − β₂ᵗ in float32, 6e-8 of 1e-3 off at the first steps and half of it in
# the root; v and r then remember 20 to 40 steps of roundings.
SWITCHED = 1e-4

GLOBAL = ("adam/update_rms", "adam/correlation", "adam/eps_share", "adam/zero_fraction")
SAFE = ost.scale_by_safe_adam()


@functools.cache
def compiled(function):
    return jax.jit(function)


def step(tx, grads, state=None):
    """The state after one step on a tree or a vector."""
    grads = grads if isinstance(grads, dict) else {"w": np.array(grads, np.float32)}
    return compiled(tx.update)(grads, tx.init(grads) if state is None else state)[1]


# --- metrics ---------------------------------------------------------------------


def two_leaves(a, b):
    return {"a": np.array(a, np.float32), "b": np.array(b, np.float32)}


ONES = two_leaves([1, 1, 1, 1, 1], [1, 1, 1])


def test_the_keys_are_there_from_the_start_and_never_change():
    fresh, updated = SAFE.init(ONES).metrics, step(SAFE, ONES).metrics
    assert set(fresh) == {*GLOBAL, *(f"{key}/per_leaf" for key in GLOBAL)}
    assert fresh.keys() == updated.keys()
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, updated)
    for key, value in fresh.items():
        assert value.shape == ((2,) if key.endswith("/per_leaf") else ())
        assert value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("params", "zeros"), [(ONES, 1.0), ({}, 0.0), ({"a": np.ones((0,), "f4")}, 0.0)]
)
def test_the_metrics_of_a_fresh_state_are_finite(params, zeros):
    found = SAFE.init(params).metrics
    chex.assert_tree_all_finite(found)
    assert float(found["adam/update_rms"]) == 0.0
    assert float(found["adam/eps_share"]) == 0.0
    assert float(found["adam/zero_fraction"]) == zeros


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_metrics_after_a_bad_first_gradient_are_finite(bad):
    chex.assert_tree_all_finite(step(SAFE, [1, bad, 0, 0]).metrics)


def test_the_metrics_of_two_steps_by_hand():
    tx = ost.scale_by_safe_adam(0.5, 0.75, 0.5)
    state = step(tx, [1, -2, 3, 0], step(tx, [1, 2, 0, 0]))
    # m = ½(½g₁ + g₂) over 1 − ¼, v = ¼(¾g₁² + g₂²) over 1 − 9/16.
    m = np.array([0.75, -0.5, 1.5]) / 0.75
    r = np.sqrt(np.array([0.4375, 1.75, 2.25]) / 0.4375)
    found = state.metrics
    update_rms = np.sqrt(np.sum((m / r) ** 2) / 4)
    assert float(found["adam/update_rms"]) == pytest.approx(update_rms, rel=ROUNDING)
    eps_share = (np.sum(0.5 / (r + 0.5)) + 1.0) / 4
    assert float(found["adam/eps_share"]) == pytest.approx(eps_share, rel=ROUNDING)
    assert float(found["adam/zero_fraction"]) == 0.25


CORRELATIONS = (-0.5, 0.0, 0.5, 0.9)
SIZE, STEPS = 16384, 300


@functools.cache
def after_ar1():
    """The metrics after 300 steps; leaf i follows AR(1) with CORRELATIONS[i]."""
    kept = jnp.array(CORRELATIONS)[:, None]

    def advance(carry, key):
        g, state = carry
        g = kept * g + jnp.sqrt(1 - kept**2) * jax.random.normal(key, g.shape)
        _, state = SAFE.update(list(g), state)
        return (g, state), None

    @jax.jit
    def run(key):
        first, *keys = jax.random.split(key, STEPS + 1)
        g = jax.random.normal(first, (len(CORRELATIONS), SIZE))
        return jax.lax.scan(advance, (g, SAFE.init(list(g))), jnp.stack(keys))[0][1]

    return run(jax.random.key(0)).metrics


# R = mean(u²) over 16384 coordinates has a deviation of √(2/16384) = 1.1 % of R, and
# 1/v̂ of T effective squares exceeds 1/v by 2/T: T = 300·(1−ρ²)/(1+ρ²).
def relative_error_of_mean_square(correlation):
    effective = STEPS * (1 - correlation**2) / (1 + correlation**2)
    return 3 * np.sqrt(2 / SIZE) + 2 / effective


@full
def test_independent_gradients_have_update_rms_0_229():
    found = float(after_ar1()["adam/update_rms/per_leaf"][1])
    expected = np.sqrt((1 - 0.9) / (1 + 0.9))
    assert expected == pytest.approx(0.229, abs=5e-4)
    assert found == pytest.approx(expected, rel=relative_error_of_mean_square(0.0) / 2)


@pytest.mark.parametrize("correlation", CORRELATIONS)
@quick_only("0.5")
def test_the_correlation_of_ar1_gradients_is_recovered(correlation):
    i = CORRELATIONS.index(correlation)
    found = float(after_ar1()["adam/correlation/per_leaf"][i])
    # ρ̂ = (R−c)/(β₁(R+c)), so δρ̂ = 2cR/(β₁(R+c)²)·δR/R with R = c(1+β₁ρ)/(1−β₁ρ).
    c = 0.1 / 1.9
    mean_square = c * (1 + 0.9 * correlation) / (1 - 0.9 * correlation)
    slope = 2 * c * mean_square / (0.9 * (mean_square + c) ** 2)
    error = slope * relative_error_of_mean_square(correlation)
    assert error < 0.05
    assert found == pytest.approx(correlation, abs=error)


@pytest.mark.parametrize("b1", [0.0, 0.9, 0.99])
def test_the_correlation_is_zero_at_the_first_step(b1):
    state = step(ost.scale_by_safe_adam(b1), [1, -2, 3e10, 4e-10])
    # (2/w − 1)·(1−β₁)/(1+β₁) is 1 to the rounding of w = 1 − β₁.
    found = float(state.metrics["adam/correlation"])
    assert found == pytest.approx(0.0, abs=ROUNDING / (1 - b1))


def test_the_correlation_of_a_constant_gradient_is_one():
    state = None
    for _ in range(200):
        state = step(SAFE, [1, -2, 3e10, 4e-10], state)
    assert float(state.metrics["adam/correlation"]) == pytest.approx(1.0, abs=1e-4)


def test_the_correlation_does_not_depend_on_coordinates_without_gradients():
    found = float(step(SAFE, [1, -2, 0, 0]).metrics["adam/correlation"])
    assert found == pytest.approx(0.0, abs=10 * ROUNDING)


def test_eps_share_is_one_half_where_eps_equals_the_root_mean_square():
    tx = ost.scale_by_safe_adam(eps=0.25)
    equal = step(tx, [0.25] * 4).metrics
    assert float(equal["adam/eps_share"]) == pytest.approx(0.5, rel=ROUNDING)
    mixed = step(tx, [0.25, 0.0, 1e6, 0.75]).metrics
    expected = (0.5 + 1 + 0.25e-6 + 0.25) / 4
    assert float(mixed["adam/eps_share"]) == pytest.approx(expected, rel=ROUNDING)
    assert float(step(SAFE, [0.25, 0.0, 1e6, 0.75]).metrics["adam/eps_share"]) == 0.0


def test_eps_share_uses_the_eps_of_the_last_step():
    tx = ost.scale_by_safe_adam(eps=lambda step: jnp.where(step == 0, 1.0, 0.0))
    first = step(tx, [1.0] * 4)
    assert float(first.metrics["adam/eps_share"]) == pytest.approx(0.5, rel=ROUNDING)
    assert float(step(tx, [1.0] * 4, first).metrics["adam/eps_share"]) == 0.0


def test_zero_fraction_counts_coordinates_that_never_had_a_gradient():
    tx = ost.scale_by_safe_adam(b1=0.0)  # so that the mean is 0 after one zero
    state = step(tx, two_leaves([1, 0, 0, 0, 2], [0, 0, 3]))
    for _ in range(2):
        found = state.metrics
        assert float(found["adam/zero_fraction"]) == pytest.approx(5 / 8)
        per_leaf = found["adam/zero_fraction/per_leaf"]
        np.testing.assert_allclose(per_leaf, [3 / 5, 2 / 3], rtol=ROUNDING)
        state = step(tx, two_leaves([0] * 5, [0] * 3), state)


def test_the_global_metric_weighs_every_coordinate_alike():
    found = step(SAFE, two_leaves([1, -1, 1, -1, 1], [0, 0, 0])).metrics
    assert float(found["adam/zero_fraction"]) == pytest.approx(3 / 8)
    assert float(found["adam/update_rms"]) == pytest.approx(np.sqrt(5 / 8))
    per_leaf = found["adam/update_rms/per_leaf"]
    np.testing.assert_allclose(per_leaf, [1.0, 0.0], rtol=ROUNDING)


def test_the_vectors_are_named_after_their_leaves():
    grads = two_leaves([1, 1, 1, 1, 1], [0, 0, 0])
    found = ost.metrics(step(SAFE, grads), params=grads)
    names = {key.removeprefix("adam/zero_fraction") for key in found if "zero" in key}
    assert names == {"", "/a", "/b"}
    assert float(found["adam/zero_fraction/b"]) == 1.0
    assert float(found["adam/zero_fraction/a"]) == 0.0


@pytest.mark.parametrize("options", [{"update_rms_max": 0.5}, {"eps": 0.1}], ids=str)
def test_update_rms_is_that_of_the_update_without_eps_and_clipping(options):
    tx, state, plain = ost.scale_by_safe_adam(**options), None, None
    for grads in np.random.default_rng(0).standard_normal((20, 4), "f4"):
        state, plain = step(tx, grads, state), step(SAFE, grads, plain)
    found, expected = (
        float(each.metrics["adam/update_rms"]) for each in (state, plain)
    )
    assert found == pytest.approx(expected, rel=ROUNDING)


def test_update_rms_is_that_of_the_last_update():
    grads = np.random.default_rng(0).standard_normal((20, 4), "f4")
    updates, state = advance(SAFE, [{"w": each} for each in grads])
    expected = np.sqrt(np.mean(np.square(updates[-1]["w"])))
    found = float(state.metrics["adam/update_rms"])
    assert found == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    "options", [{"rms_dtype": jnp.bfloat16}, {"mu_dtype": jnp.bfloat16}]
)
@quick_only("options0")
def test_the_metrics_of_narrow_storage_are_float32(options):
    state = step(ost.scale_by_safe_adam(**options), [1.0] * 4)
    assert {value.dtype for value in state.metrics.values()} == {jnp.dtype("float32")}
    assert float(state.metrics["adam/update_rms"]) == pytest.approx(1.0, rel=2**-7)


def test_update_rms_keeps_the_bound_where_the_storage_of_rms_ends():
    state = step(ost.scale_by_safe_adam(rms_dtype=jnp.float16), [1e9] * 4)
    found = float(state.metrics["adam/update_rms"])
    assert found == pytest.approx(7.2703, rel=5e-5)


# --- the bound -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b1", "b2", "expected"),
    [(0.9, 0.999, 7.2703), (0.9, 0.95, 1.1650), (0.9, 0.9, 1.0), (0.0, 0.75, 2.0)],
)
def test_the_bound_of_the_update(b1, b2, expected):
    found = float(update_bound(jnp.float32(b1), jnp.float32(b2)))
    assert found == pytest.approx(expected, rel=5e-5)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.5), (0.99, 0.9)])
def test_there_is_no_bound_where_the_mean_outlives_the_mean_square(b1, b2):
    found = float(update_bound(jnp.float32(b1), jnp.float32(b2)))
    assert found == float(np.finfo(np.float32).max)


# --- from and to optax -----------------------------------------------------------


def trees(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "a": rng.standard_normal((3, 2), "f4"),
            "b": 1e-3 * rng.standard_normal(4, "f4"),
        }
        for _ in range(steps)
    ]


def inside(adam):
    """Adam alone and inside of what an optimizer state can be made of."""
    return {
        "bare": adam,
        "chain": optax.chain(optax.clip_by_global_norm(1.0), adam, optax.scale(-0.1)),
        "masked": optax.masked(adam, {"a": True, "b": False}),
        "MultiSteps": optax.MultiSteps(optax.chain(adam, optax.scale(-0.1)), 3),
    }


OPTAX = inside(optax.scale_by_adam(b2=0.99, eps=1e-8))
OURS = inside(ost.scale_by_safe_adam(b2=0.99, eps=1e-8))


def advance(tx, grads, state=None):
    """The update of each step, and the last state."""
    state, updates = tx.init(grads[0]) if state is None else state, []
    for each in grads:
        update, state = compiled(tx.update)(each, state)
        updates.append(update)
    return updates, state


@pytest.mark.parametrize("name", OURS)
@quick_only("bare")
def test_a_running_job_switches_to_safe_adam_and_goes_on_the_same(name):
    _, state = advance(OPTAX[name], trees(20))
    expected, _ = advance(OPTAX[name], trees(20, seed=1), state)
    converted = ost.from_optax_adam_state(state, b2=0.99, eps=1e-8)
    fresh = OURS[name].init(trees(1)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, fresh)
    chex.assert_trees_all_equal_structs(converted, fresh)
    found, _ = advance(OURS[name], trees(20, seed=1), converted)
    chex.assert_trees_all_close(found, expected, rtol=SWITCHED, atol=SWITCHED)


@pytest.mark.parametrize("name", OURS)
@quick_only("bare")
def test_a_running_job_switches_back_to_optax_and_goes_on_the_same(name):
    _, state = advance(OURS[name], trees(20))
    expected, _ = advance(OURS[name], trees(20, seed=1), state)
    converted = ost.to_optax_adam_state(state)
    fresh = OPTAX[name].init(trees(1)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, fresh)
    chex.assert_trees_all_equal_structs(converted, fresh)
    found, _ = advance(OPTAX[name], trees(20, seed=1), converted)
    chex.assert_trees_all_close(found, expected, rtol=SWITCHED, atol=SWITCHED)


@pytest.mark.parametrize("steps", [0, 1, 20])
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.95)])
def test_the_units_are_the_bias_corrections_of_the_count(b1, b2, steps):
    state = optax.scale_by_adam().init(trees(1)[0])
    found = ost.from_optax_adam_state(state._replace(count=jnp.int32(steps)), b1, b2)
    assert int(found.step) == steps
    assert float(found.mu_unit) == pytest.approx(1 - b1**steps, rel=ROUNDING)
    assert float(found.rms_unit) == pytest.approx(np.sqrt(1 - b2**steps), rel=ROUNDING)
    assert (float(found.b1), float(found.b2)) == pytest.approx((b1, b2), rel=ROUNDING)
    chex.assert_tree_all_finite(found)


def test_the_units_of_a_long_run_do_not_cancel():
    state = optax.scale_by_adam().init(trees(1)[0])._replace(count=jnp.int32(3))
    found = ost.from_optax_adam_state(state, 0.9999, 0.999999)
    assert float(found.mu_unit) == pytest.approx(1 - 0.9999**3, rel=ROUNDING)
    expected = np.sqrt(-np.expm1(3 * np.log(0.999999)))
    assert float(found.rms_unit) == pytest.approx(expected, rel=ROUNDING)


def test_every_part_that_is_not_of_adam_comes_back_unchanged():
    _, state = advance(OPTAX["MultiSteps"], trees(5))
    there = ost.from_optax_adam_state(state)
    back = ost.to_optax_adam_state(there)
    chex.assert_trees_all_equal_structs(back, state)
    chex.assert_trees_all_close(back, state, rtol=ROUNDING)
    assert isinstance(there.inner_opt_state[0], ost.SafeAdamState)
    chex.assert_trees_all_equal(there.acc_grads, state.acc_grads)


def test_several_states_are_all_converted():
    tx = optax.partition(
        {"x": optax.scale_by_adam(), "y": optax.adamw(0.1)}, {"a": "x", "b": "y"}
    )
    converted = ost.from_optax_adam_state(tx.init(trees(1)[0]))
    keys = ost.metrics(converted)
    assert sum(key.endswith("adam/update_rms") for key in keys) == 2
    back = ost.to_optax_adam_state(converted)
    chex.assert_trees_all_equal_structs(back, tx.init(trees(1)[0]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rms_may_be_stored_narrow_after_the_switch(dtype):
    _, state = advance(OPTAX["bare"], trees(5))
    convert = functools.partial(ost.from_optax_adam_state, rms_dtype=dtype)
    found = jax.jit(convert)(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.rms)} == {jnp.dtype(dtype)}
    expected = jax.tree.map(np.sqrt, state.nu)
    narrow = jax.tree.map(lambda x: np.asarray(x).astype("f4"), found.rms)
    chex.assert_trees_all_close(narrow, expected, rtol=2.0**-7)


@pytest.mark.parametrize("nu", [1e16, 1e-16])
def test_a_switch_to_float16_makes_no_root_infinite_and_none_zero(nu):
    state = optax.scale_by_adam().init({"w": np.ones(2, "f4")})
    state = state._replace(count=jnp.int32(9), nu={"w": jnp.array([nu, 1.0])})
    rms = ost.from_optax_adam_state(state, rms_dtype=jnp.float16).rms["w"]
    assert np.isfinite(rms).all()
    assert (np.asarray(rms) > 0).all()


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_and_back_gives_the_dtypes_of_optax(dtype, mu_dtype):
    tx = optax.scale_by_adam(mu_dtype=mu_dtype)
    params = {"w": jnp.ones(3, dtype)}
    state = compiled(tx.update)(params, tx.init(params))[1]
    safe = ost.from_optax_adam_state(state, mu_dtype=mu_dtype)
    assert safe.mu["w"].dtype == (mu_dtype or jnp.float32)
    back = ost.to_optax_adam_state(safe, mu_dtype=mu_dtype or dtype, nu_dtype=dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), back),
        jax.tree.map(lambda x: x.astype(jnp.float32), state),
        rtol=ROUNDING,
    )


def test_the_switch_works_under_jit_and_on_shapes():
    state = optax.adamw(0.1).init(trees(1)[0])
    converted = jax.jit(ost.from_optax_adam_state)(state)
    shapes = jax.eval_shape(ost.from_optax_adam_state, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, shapes)
    back = jax.jit(ost.to_optax_adam_state)(converted)
    chex.assert_trees_all_equal_structs(back, state)


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (ost.from_optax_adam_state, "ScaleByAdamState"),
        (ost.to_optax_adam_state, "SafeAdamState"),
    ],
)
@pytest.mark.parametrize(
    "state", [optax.EmptyState(), (), {"w": jnp.ones(2)}], ids=repr
)
def test_a_state_without_adam_raises_and_says_what_is_missing(convert, name, state):
    with pytest.raises(ValueError, match=f"holds no {name}") as raised:
        convert(state)
    assert type(state).__name__ in str(raised.value)


def test_each_direction_needs_the_other_state():
    with pytest.raises(ValueError, match="holds no ScaleByAdamState"):
        ost.from_optax_adam_state(SAFE.init(trees(1)[0]))
    with pytest.raises(ValueError, match="holds no SafeAdamState"):
        ost.to_optax_adam_state(optax.scale_by_adam().init(trees(1)[0]))


@pytest.mark.parametrize(
    ("name", "value"), [("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", 0)]
)
def test_a_beta_out_of_range_raises_with_its_name_and_value(name, value):
    state = optax.scale_by_adam().init(trees(1)[0])
    with pytest.raises(ValueError, match="is usual") as raised:
        ost.from_optax_adam_state(state, **{name: value})
    assert f"{name}={value!r}" in str(raised.value)
