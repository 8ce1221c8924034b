"""What passes is reported as it is, and passes as it is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full, quick_only

import optax_stability as ost

# Norms are sums of a few float32 products.
RTOL = 1e-6


def measure(grads, **kwargs):
    tx = ost.record("grad", **kwargs)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal(updates, grads)
    return state.metrics


def numpys(leaves):
    """What NumPy says of each of a list of float64 vectors."""

    def bimodality(x):
        fourth = np.count_nonzero(x) * np.sum(x**4)
        return np.sum(x**2) ** 2 / fourth if fourth else 0.0

    return {
        "norm": [np.linalg.norm(x) for x in leaves],
        "rms": [np.sqrt(np.mean(x**2)) for x in leaves],
        "max_abs": [np.abs(x).max() for x in leaves],
        "zero_fraction": [np.mean(x == 0) for x in leaves],
        "nonfinite": [0.0 for x in leaves],
        "bimodality": [bimodality(x) for x in leaves],
    }


@pytest.mark.parametrize(
    ("dtype", "every"), [(jnp.float32, 1), (jnp.bfloat16, 3), (jnp.float16, 1)]
)
@quick_only("float16-1")
def test_every_statistic_is_numpys(dtype, every):
    a = jax.random.normal(jax.random.key(0), (3, 5)).astype(dtype).at[0, :2].set(0)
    b = (100 * jax.random.normal(jax.random.key(1), (7,))).astype(dtype)
    c = 1e-3 * jnp.where(jnp.arange(6) % 2, 1, -1).astype(dtype)
    found = measure({"a": a, "b": b, "c": c}, every=every)
    leaves = [np.asarray(x, np.float64).ravel() for x in (a, b, c)]
    for key, value in numpys(leaves).items():
        np.testing.assert_allclose(found[f"grad/{key}/per_leaf"], value, rtol=RTOL)
    for key, value in numpys([np.concatenate(leaves)]).items():
        if key != "bimodality":  # Of the whole it takes each leaf by its own size.
            np.testing.assert_allclose(found[f"grad/{key}"], value[0], rtol=RTOL)
    scaled = [x / np.sqrt(np.mean(x**2) * x.size / np.count_nonzero(x)) for x in leaves]
    whole = numpys([np.concatenate(scaled)])["bimodality"]
    np.testing.assert_allclose(found["grad/bimodality"], whole[0], rtol=RTOL)


def test_shards_are_measured_as_a_whole():
    """An axis of ``vmap`` counts as sharding, and compiles faster than a mesh."""
    whole = {"a": jnp.arange(8.0), "b": jnp.arange(12.0).at[3].set(jnp.inf)}
    expected = measure(whole)
    tx = ost.record("grad", axis_name="part")

    def metrics_of(shard):
        return tx.update(shard, tx.init(shard))[1].metrics

    shards = jax.tree.map(lambda x: x.reshape(4, -1), whole)
    found = jax.jit(jax.vmap(metrics_of, axis_name="part"))(shards)
    for key, value in expected.items():
        for each in found[key]:
            np.testing.assert_allclose(each, value, rtol=RTOL, err_msg=key)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e18, 1e30])
@quick_only("1.0")
def test_bimodality_tells_one_mode_from_two_at_every_size(scale):
    draw = jax.random.normal(jax.random.key(0), (100_000,))
    shapes = {
        "gauss": (draw, 1 / 3),
        "two modes": (jnp.sign(draw), 1.0),
        "uniform": (jax.random.uniform(jax.random.key(1), (100_000,)) - 0.5, 5 / 9),
        "half of it zero": (jnp.where(jnp.arange(100_000) % 2, draw, 0), 1 / 3),
    }
    found = measure({name: scale * x for name, (x, _) in shapes.items()})
    expected = [shapes[name][1] for name in sorted(shapes)]
    # Three standard errors of a fourth moment of 50,000 numbers: 3·√(96/9/n).
    np.testing.assert_allclose(
        found["grad/bimodality/per_leaf"], expected, rtol=3 * (96 / 9 / 5e4) ** 0.5
    )


def test_a_leaf_far_smaller_than_another_keeps_its_bimodality():
    signs = jnp.where(jnp.arange(64) % 2, 1.0, -1.0)
    found = measure({"large": 1e6 * signs, "small": 1e-8 * signs})
    # Fourth powers have four times the rounding.
    np.testing.assert_allclose(found["grad/bimodality/per_leaf"], 1.0, rtol=4 * RTOL)


@full
def test_many_leaves_of_one_shape_are_told_apart():
    leaves = {f"{i:03}": jnp.full((4, 4), float(i)) for i in range(50)}
    leaves["vector"] = jnp.full(7, -3.0)
    found = measure(leaves, every=2)
    expected = [float(i) for i in range(50)] + [3.0]
    np.testing.assert_allclose(found["grad/max_abs/per_leaf"], expected)
    zeros = [1.0] + 50 * [0.0]
    np.testing.assert_allclose(found["grad/zero_fraction/per_leaf"], zeros)


def test_entries_that_are_not_finite_are_counted_at_any_step():
    tx = ost.record("grad", every=1000)
    good = {"a": jnp.ones(4), "b": jnp.ones((2, 3))}
    update = jax.jit(tx.update)
    _, state = update(good, tx.init(good))
    bad = {"a": jnp.ones(4), "b": jnp.array([[1, jnp.nan, jnp.inf], [0, 0, -jnp.inf]])}
    passed, state = update(bad, state)
    chex.assert_trees_all_equal(passed, bad)
    assert float(state.metrics["grad/nonfinite"]) == pytest.approx(3 / 10)
    assert state.metrics["grad/nonfinite/per_leaf"].tolist() == [0.0, 0.5]
    assert float(state.metrics["grad/bimodality/per_leaf"][0]) == 1.0


def test_what_is_not_due_keeps_its_value():
    tx = ost.record("grad", every=3)
    update, state = jax.jit(tx.update), tx.init({"a": jnp.ones(2)})
    seen = []
    for step in range(7):
        _, state = update({"a": jnp.full(2, step + 1.0)}, state)
        seen.append((float(state.metrics["grad/rms"]), state.metrics["grad/max_abs"]))
    rms, largest = zip(*seen, strict=True)
    np.testing.assert_allclose(rms, [1, 2, 3, 4, 5, 6, 7], rtol=RTOL)
    assert [float(x) for x in largest] == [1, 1, 1, 4, 4, 4, 7]


def run(tx, params, updates):
    state, update = tx.init(params), jax.jit(tx.update)
    for each in updates:
        _, state = update(each, state, params)
    return {key: np.asarray(x) for key, x in state.metrics.items()}


def test_the_ratio_to_the_parameters_is_by_leaf_and_zero_where_they_are():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2), "c": jnp.ones(1)}
    updates = {"a": jnp.array([0.6, 0.8]), "b": jnp.ones(2), "c": jnp.full(1, 0.5)}
    found = run(ost.record("update", ratio_to_params=True), params, [updates])
    expected = [0.2, 0.0, 0.5]
    np.testing.assert_allclose(found["update/param_ratio/per_leaf"], expected, RTOL)
    whole = np.sqrt(1 + 2 + 0.25) / np.sqrt(26)
    np.testing.assert_allclose(found["update/param_ratio"], whole, RTOL)


def test_parameters_can_be_looked_at_and_the_updates_pass():
    params, updates = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([1.0, 0.0])}
    tx = ost.record("params", of="params")
    passed, state = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(passed, updates)
    assert float(state.metrics["params/norm"]) == 5.0


@pytest.mark.parametrize("options", [{"of": "params"}, {"ratio_to_params": True}])
def test_parameters_that_are_missing_are_asked_for(options):
    tx = ost.record("x", **options)
    state = tx.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"record\('x'\).*pass params to update"):
        tx.update({"a": jnp.ones(2)}, state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@quick_only("float32")
def test_the_correlation_is_the_cosine_with_the_measurement_before(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {"a": jnp.zeros((5, 7), dtype), "b": jnp.zeros((), dtype)}
    updates = [
        {"a": jax.random.normal(k, (5, 7)).astype(dtype), "b": jnp.asarray(i, dtype)}
        for i, k in enumerate(keys)
    ]
    found = run(ost.record("u", correlation=True, every=2), params, updates[:5])
    before, now = (
        {name: np.asarray(x, np.float64) for name, x in updates[i].items()}
        for i in (2, 4)
    )

    def cosine(x, y):
        return np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))

    rtol = 1e-5 if dtype == jnp.float32 else 2e-2  # Of the directions it keeps.
    expected = [cosine(now[name], before[name]) for name in "ab"]
    np.testing.assert_allclose(found["u/correlation/per_leaf"], expected, rtol, rtol)
    x, y = (np.append(tree["a"].ravel(), tree["b"]) for tree in (now, before))
    np.testing.assert_allclose(found["u/correlation"], cosine(x, y), rtol, rtol)


def test_what_is_not_finite_or_zero_is_not_what_the_next_is_compared_with():
    good, bad = jnp.array([3.0, 4.0]), jnp.array([jnp.inf, jnp.nan])
    updates = [{"a": x} for x in (good, bad, jnp.zeros(2), good)]
    found = run(ost.record("u", correlation=True), {"a": good}, updates)
    assert float(found["u/correlation"]) == pytest.approx(1.0)


def largest_singular_value(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)[0]


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e25])
@quick_only("1.0")
def test_the_singular_value_of_weights_is_followed_and_never_exceeded(scale):
    keys = jax.random.split(jax.random.key(0), 3)
    start = {
        "tall": scale * jax.random.normal(keys[0], (40, 12)),
        "wide": scale * jax.random.normal(keys[1], (6, 30)),
        "bias": jnp.ones(4),
        "zero": jnp.zeros((3, 3)),
    }
    drift = scale * 0.002 * jax.random.normal(keys[2], (40, 12))
    tx = ost.record("w", of="params", spectral=True)
    state, update = tx.init(start), jax.jit(tx.update)
    for step in range(30):
        # One that is not finite does not stop it.
        drifted = start["tall"] + step * drift if step != 20 else jnp.nan * drift
        params = start | {"tall": drifted}
        _, state = update(params, state, params)
    by_name = ost.metrics(state, params=start)
    for name in ("tall", "wide"):
        true = largest_singular_value(params[name])
        value = float(by_name[f"w/spectral_norm/{name}"])
        assert 0.99 * true <= value <= true * (1 + 1e-5)
    assert float(by_name["w/spectral_norm/zero"]) == 0.0
    assert float(by_name["w/spectral_norm/bias"]) == 0.0
    values = [by_name[f"w/spectral_norm/{name}"] for name in ("tall", "wide")]
    assert float(by_name["w/spectral_norm"]) == pytest.approx(float(max(values)))


@full
def test_a_matrix_that_was_not_finite_is_followed_again():
    good = {"w": jnp.diag(jnp.array([5.0, 1.0]))}
    bad = {"w": jnp.full((2, 2), jnp.nan)}
    found = run(ost.record("u", spectral=True), good, [good, bad])
    assert np.isnan(found["u/spectral_norm/per_leaf"][0])
    found = run(ost.record("u", spectral=True), good, [good, bad, good])
    assert float(found["u/spectral_norm"]) == pytest.approx(5.0)


def test_the_histogram_is_numpys():
    edges = ost.histogram_edges()
    x = jnp.exp2(jax.random.uniform(jax.random.key(0), (500,), minval=-45, maxval=12))
    on_edges = -jnp.asarray(edges[1:-1])  # An edge belongs to the bin it begins.
    leaves = {"a": x.reshape(20, 25), "b": on_edges, "c": jnp.zeros(3)}
    found = measure(leaves, histogram=True)
    expected = [
        np.histogram(np.abs(np.asarray(leaf)).ravel(), edges)[0]
        for leaf in (x, on_edges)
    ]
    expected.append(np.zeros(len(edges) - 1))
    np.testing.assert_array_equal(found["grad/histogram/per_leaf"], expected)
    np.testing.assert_array_equal(found["grad/histogram"], np.sum(expected, axis=0))


def test_infinity_is_in_the_last_bin_and_nan_in_none():
    found = measure({"a": jnp.array([jnp.inf, jnp.nan, 1.0])}, histogram=True)
    counts = found["grad/histogram"]
    assert float(counts[-1]) == 1.0
    assert float(counts.sum()) == 2.0


@full
def test_stacked_leaves_are_measured_layer_by_layer():
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.random.normal(keys[0], (3, 4, 5))
    params = {"blocks": {"kernel": stacked}, "head": jax.random.normal(keys[1], (4,))}
    apart = {"blocks": {"kernel": list(stacked)}, "head": params["head"]}
    options = {"spectral": True, "histogram": True, "correlation": True}
    which = {"blocks": True, "head": False}
    together = ost.record("u", stacked=which, **options)
    found = run(together, params, 2 * [params])
    expected = run(ost.record("u", **options), apart, 2 * [apart])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    _, state = together.update(params, together.init(params), params)
    names = ost.metrics(state, params=params)
    assert "u/norm/blocks/kernel/2" in names


def test_a_mask_and_a_stack_go_together():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    tx = optax.masked(
        ost.record("g", stacked=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)),
        {"a": True, "b": False},
    )
    _, state = tx.update(params, tx.init(params), params)
    found = ost.metrics(state, params=params)
    assert {"g/norm/a/0", "g/norm/a/1"} == {k for k in found if k.startswith("g/norm/")}


@full
def test_derivatives_pass():
    tx = ost.record("grad", every=2)

    def updated(x):
        grads = {"w": x}
        return jnp.sum(tx.update(grads, tx.init(grads))[0]["w"] ** 2)

    np.testing.assert_allclose(jax.grad(updated)(jnp.array([1.0, 2.0])), [2.0, 4.0])


def test_a_nan_is_reported_where_it_is_and_forgotten_next_step():
    tx = ost.record("grad")
    good = {"a": jnp.ones(3), "b": jnp.ones(3)}
    bad = {"a": jnp.array([1.0, jnp.nan, 1.0]), "b": jnp.ones(3)}
    _, state = tx.update(bad, tx.init(good))
    assert np.isnan(state.metrics["grad/norm"])
    assert np.isnan(state.metrics["grad/norm/per_leaf"]).tolist() == [True, False]
    _, state = tx.update(good, state)
    chex.assert_tree_all_finite(state.metrics)


def test_a_norm_whose_square_overflows_is_reported_right():
    found = measure({"a": jnp.array([3e20, 4e20])})
    np.testing.assert_allclose(found["grad/norm"], 5e20, rtol=RTOL)
    np.testing.assert_allclose(found["grad/max_abs"], 4e20, rtol=RTOL)


def test_empty_trees_and_leaves_measure_zero():
    assert float(measure({})["grad/norm"]) == 0.0
    found = measure({"a": jnp.zeros((0, 3)), "b": jnp.ones(4)})
    assert found["grad/rms/per_leaf"].tolist() == [0.0, 1.0]
    assert found["grad/max_abs/per_leaf"].tolist() == [0.0, 1.0]


def test_vectors_can_be_left_out():
    keys = measure({"a": jnp.ones(2)}, per_leaf=False).keys()
    names = "norm rms max_abs zero_fraction nonfinite bimodality"
    assert keys == {f"grad/{name}" for name in names.split()}


@pytest.mark.parametrize("name", ["", 3])
def test_the_name_must_be_a_string(name):
    with pytest.raises(ValueError, match=f"name={name!r} must be a non-empty string"):
        ost.record(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"of": "gradients"}, "of='gradients'.*updates"),
        ({"every": 0}, "every=0"),
        ({"of": "params", "ratio_to_params": True}, "ratio_to_params=True"),
        ({"spectral": True, "axis_name": "data"}, "spectral=True needs whole matrices"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ost.record("grad", **arguments)


def test_a_scalar_has_no_layers():
    tx = ost.record("grad", stacked=True)
    with pytest.raises(ValueError, match="stacked marks 'b', a scalar"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(())})


# --- look= -------------------------------------------------------------------------

GRADS = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}


def looked_at(look, tx=None, steps=1):
    """The metrics after a first step, and steps with ``look`` on twice the gradient."""
    tx = ost.record("grad", every=3) if tx is None else tx
    _, state = tx.update(GRADS, tx.init(GRADS), GRADS)
    double = jax.tree.map(lambda x: 2 * x, GRADS)
    for _ in range(steps):
        _, state = tx.update(double, state, double, look=look)
    return ost.metrics(state)


def test_look_decides_instead_of_every():
    assert looked_at(None)["grad/max_abs"] == 4
    assert looked_at(None, steps=3)["grad/max_abs"] == 8
    assert looked_at(True)["grad/max_abs"] == 8
    assert looked_at(False, steps=3)["grad/max_abs"] == 4
    assert looked_at(np.True_)["grad/max_abs"] == 8


def test_a_traced_look_is_a_condition():
    found = jax.jit(looked_at)(jnp.array(True)), jax.jit(looked_at)(jnp.array(False))
    assert [int(each["grad/max_abs"]) for each in found] == [8, 4]


def test_without_a_look_only_a_norm_that_is_known_is_measured():
    assert looked_at(False)["grad/norm"] == 5
    in_history = ost.record_history(ost.record("grad", every=3), length=2)
    found = looked_at(False, in_history)
    assert found["grad/norm"] == 10
    assert found["grad/max_abs"] == 4


def test_the_parameters_are_measured_when_the_rest_is():
    tx = ost.record("params", of="params", every=3)
    assert looked_at(None, tx)["params/norm"] == 5
    assert looked_at(None, tx, steps=3)["params/norm"] == 10
    assert looked_at(True, tx)["params/norm"] == 10


def test_slow_metrics_of_a_history_follow_look():
    tx = ost.record_history(ost.safe_adamw(0.1), length=4, slow_every=2)
    state = tx.init(GRADS)
    for look in (True, False, True):
        _, state = tx.update(GRADS, state, GRADS, look=look)
    seen = ost.history(state)["adam/update_rms"]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("look", [1, 0.5, jnp.ones(2, bool)])
def test_a_look_that_is_no_bool_is_an_error(look):
    with pytest.raises(ValueError, match=r"look must be True or False"):
        looked_at(look)
