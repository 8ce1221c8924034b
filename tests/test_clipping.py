"""Clipping: the limit holds, inactive is identity, one bad leaf stays alone."""

import collections
import functools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost
from optax_stability import thresholds

# A norm of a few dozen float32 squares, a quotient and a product.
ROUNDING = 1e-6
# Half a spacing of the dtype per entry, and ROUNDING.
SLACK = {jnp.float32: 2e-6, jnp.bfloat16: 4e-3, jnp.float16: 1e-3}

SCOPES = {
    "global": "global",
    "leaf": "leaf",
    "labels": lambda tree: jax.tree.map(
        lambda x: "flat" if x.ndim < 2 else "deep", tree
    ),
    "prefix": lambda tree: {"head": "slow", "body": "fast"},
}


def random_tree(seed=0, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray((scale * rng.standard_normal(shape)).astype("f4"), dtype)

    body = {"w": leaf(4, 3), "b": leaf(3), "layers": [leaf(2, 2, 2), leaf()]}
    return {"head": {"w": leaf(3, 5)}, "body": body}


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def clip(tx, grads, state=None):
    return compiled(tx)(grads, tx.init(grads) if state is None else state)


@functools.cache
def clip_at(limit, scope="global"):
    return ost.clip_by_threshold(thresholds.constant(limit), scope=SCOPES[scope])


def run(tx, trees):
    """The updates and states of several steps."""
    state, updates, states = tx.init(trees[0]), [], []
    for grads in trees:
        update, state = clip(tx, grads, state)
        updates.append(update)
        states.append(state)
    return updates, states


def norm_of(tree):
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(x * x) for x in leaves))


def bits(tree):
    """The bits of every leaf, so that −0, NaN and rounding are compared exactly."""
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


def labels_of(tree, scope):
    if scope in ("global", "leaf"):
        names = ost.leaf_names(tree)
        return names if scope == "leaf" else ["all"] * len(names)
    return jax.tree.leaves(jax.tree.broadcast(SCOPES[scope](tree), tree))


def reference(tree, limit, scope):
    """Pascanu's rule in float64, per scope: g·limit/‖g‖ where ‖g‖ > limit."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [np.asarray(x).astype(np.float64) for x in leaves]
    labels, squares = labels_of(tree, scope), collections.Counter()
    for label, x in zip(labels, leaves, strict=True):
        squares[label] += np.sum(x * x)
    norms = [np.sqrt(squares[label]) for label in labels]
    clipped = [
        x * min(1.0, limit / norm) for x, norm in zip(leaves, norms, strict=True)
    ]
    return jax.tree.unflatten(treedef, clipped), np.array(norms)


# --- the rule --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-3, 1.0, 4.0, 1e3])
def test_a_constant_limit_equals_clip_by_global_norm_of_optax(limit):
    grads = random_tree()
    expected, _ = clip(optax.clip_by_global_norm(limit), grads)
    chex.assert_trees_all_close(clip(clip_at(limit), grads)[0], expected, rtol=ROUNDING)


@pytest.mark.parametrize("limit", [0.5, 2.0, 3.0, 100.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_is_clipped_by_its_own_norm(scope, limit):
    grads = random_tree()
    expected, norms = reference(grads, limit, scope)
    updates, state = clip(clip_at(limit, scope), grads)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING)
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)
    if scope == "global":
        assert state.leaf_norm is None
        assert state.leaf_limit is None
    else:
        np.testing.assert_allclose(state.leaf_norm, norms, rtol=ROUNDING)
        np.testing.assert_allclose(state.leaf_limit, limit, rtol=ROUNDING)
    scopes = len(set(labels_of(grads, scope)))
    assert float(state.limit) == pytest.approx(limit * np.sqrt(scopes), rel=ROUNDING)


def test_each_scope_has_a_stream_of_its_own():
    tx = ost.clip_by_threshold(thresholds.zscore(warmup=2), scope=SCOPES["labels"])
    trees = [random_tree(seed) for seed in range(6)]
    _, states = run(tx, trees)
    labels = labels_of(trees[0], "labels")
    for number, label in enumerate(dict.fromkeys(labels)):
        threshold = thresholds.zscore(warmup=2)
        alone = threshold.init()
        for tree in trees:
            norms = reference(tree, 1.0, "labels")[1]
            norm = norms[labels.index(label)]
            limit, alone = jax.jit(threshold.update)(norm, alone)
        found = jax.tree.map(lambda x, i=number: x[i], states[-1].threshold)
        chex.assert_trees_all_close(found, alone, rtol=1e-4)
        assert float(states[-1].leaf_limit[labels.index(label)]) == pytest.approx(
            float(limit), rel=1e-4
        )


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(
    values=hnp.arrays(np.float32, 8, elements=st.floats(-2e37, 2e37, width=32)),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(list(SLACK)),
)
def test_the_norm_after_clipping_is_at_most_the_limit(values, exponent, dtype):
    largest = float(jnp.finfo(dtype).max)
    grads = jnp.asarray(np.clip(values, -largest, largest), dtype)
    grads = {"a": grads[:3], "b": grads[3:]}
    limit = np.float32(2.0**exponent)
    updates, _ = clip_at_any(limit, grads)
    # Entries that the dtype holds as subnormal numbers are rounded to its smallest.
    smallest = np.sqrt(8) * float(jnp.finfo(dtype).smallest_subnormal)
    assert norm_of(updates) <= limit * (1 + SLACK[dtype]) + smallest
    assert jax.tree.map(lambda x: x.dtype, updates) == {"a": dtype, "b": dtype}


@jax.jit
def clip_at_any(limit, grads):
    tx = ost.clip_by_threshold(thresholds.constant(limit))
    return tx.update(grads, tx.init(grads))


# --- inactive is identity --------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", SLACK)
def test_inactive_is_identity_bit_for_bit(dtype, scope):
    grads = random_tree(dtype=dtype)
    grads["body"]["b"] = jnp.array([-0.0, 0.0, 1e-7], dtype)
    updates, _ = clip(clip_at(100.0, scope), grads)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    assert bits(updates) == bits(grads)


def test_a_norm_at_the_limit_is_not_clipped():
    grads = {"w": jnp.array([3.0, 4.0])}
    updates, state = clip(clip_at(5.0), grads)
    assert bits(updates) == bits(grads)
    assert int(state.clipped_total) == 0


def test_inactive_is_identity_for_float64():
    with jax.enable_x64(True):
        grads = {"w": jnp.array([0.1, -0.3], jnp.float64)}
        updates, _ = clip(clip_at(100.0), grads)
        assert bits(updates) == bits(grads)


def test_nothing_finite_is_clipped_in_the_warm_up():
    tx = ost.clip_by_zscore(warmup=4)
    trees = [random_tree(seed, scale=10.0**seed) for seed in range(4)]
    updates, states = run(tx, trees)
    assert bits(updates) == bits(trees)
    assert int(states[-1].clipped_total) == 0


# --- gradients that are not finite -----------------------------------------------


def poison(tree, bad):
    """Puts one bad number into the leaf body/w, which is in every second scope."""
    body = tree["body"] | {"w": tree["body"]["w"].at[1, 2].set(bad)}
    return tree | {"body": body}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_gradient_that_is_not_finite_gives_zeros_for_its_scope_alone(scope, bad):
    grads = random_tree()
    updates, state = clip(clip_at(2.0, scope), poison(grads, bad))
    clean, _ = clip(clip_at(2.0, scope), grads)
    labels = labels_of(grads, scope)
    hit = labels[ost.leaf_names(grads).index("body/w")]
    for label, found, expected in zip(
        labels, jax.tree.leaves(updates), jax.tree.leaves(clean), strict=True
    ):
        wanted = jnp.zeros_like(expected) if label == hit else expected
        np.testing.assert_array_equal(found, wanted)
    assert int(state.nonfinite_total) == 1
    assert not np.isfinite(state.norm)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_gradient_that_is_not_finite_is_not_learned_at_any_step(scope, bad):
    tx = ZSCORE_QUICK[scope]
    state = tx.init(random_tree())
    hit = ost.leaf_names(random_tree()).index("body/w") if scope == "leaf" else 0
    for seed in range(6):
        grads = random_tree(seed)
        _, poisoned = clip(tx, poison(grads, bad), state)
        _, clean = clip(tx, grads, state)
        for before, with_bad, without in zip(
            *map(jax.tree.leaves, (state, poisoned, clean)), strict=True
        ):
            if np.ndim(before) and before.shape == jnp.shape(
                jax.tree.leaves(state.threshold)[0]
            ):
                continue
        learned = jax.tree.map(np.array, clean.threshold)
        expected = jax.tree.map(
            lambda new, old: np.where(np.arange(len(new)) == hit, old, new),
            learned,
            state.threshold,
        )
        chex.assert_trees_all_equal(poisoned.threshold, expected)
        state = clean


ZSCORE_QUICK = {
    scope: ost.clip_by_zscore(warmup=2, relearn_after=3, scope=scope)
    for scope in ("global", "leaf")
}


def test_training_goes_on_after_gradients_that_are_not_finite():
    trees = [random_tree(seed) for seed in range(8)]
    with_bad = [
        *trees[:4],
        poison(trees[4], np.nan),
        poison(trees[5], np.inf),
        *trees[4:],
    ]
    updates, states = run(ZSCORE_QUICK["global"], with_bad)
    expected, expected_states = run(ZSCORE_QUICK["global"], trees)
    chex.assert_trees_all_equal(updates[6:], expected[4:])
    chex.assert_trees_all_equal(states[-1].threshold, expected_states[-1].threshold)


# --- any size --------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_an_entry_whose_square_overflows_is_clipped_like_any_other(scope):
    grads = random_tree()
    grads["body"]["b"] = jnp.array([0.5, -1e20, 2.0])
    updates, state = clip(clip_at(1.0, scope), grads)
    expected, _ = reference(grads, 1.0, scope)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING, atol=1e-30)
    assert float(state.norm) == pytest.approx(1e20, rel=ROUNDING)
    assert int(state.nonfinite_total) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_gradient_of_any_size_is_clipped_to_a_limit_of_its_size(scope, scale):
    grads = random_tree(scale=scale)
    updates, state = clip_scaled[scope](scale, grads)
    expected, _ = reference(grads, 0.5 * np.float32(scale), scope)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING, atol=0.0)
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)


def _clip_scaled(scope):
    @jax.jit
    def update(scale, grads):
        tx = ost.clip_by_threshold(thresholds.constant(0.5 * scale), scope=scope)
        return tx.update(grads, tx.init(grads))

    return update


clip_scaled = {scope: _clip_scaled(scope) for scope in ("global", "leaf")}


@pytest.mark.parametrize("largest", [1e30, 5e37, 3e38])
def test_the_largest_finite_gradients_keep_their_direction(largest):
    grads = {"w": jnp.array([largest, -0.5 * largest, 0.0], jnp.float32)}
    updates, state = clip(clip_at(1.0), grads)
    expected, _ = reference(grads, 1.0, "global")
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING)
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)


@pytest.mark.parametrize("exponent", [-90, -60, 60])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_power_of_two_scales_every_clipped_update_bit_for_bit(scope, exponent):
    trees = [random_tree(seed) for seed in range(5)] + [random_tree(5, scale=30.0)] * 6
    factor = np.float32(2.0**exponent)
    scaled_trees = jax.tree.map(lambda x: x * factor, trees)
    updates, states = run(ZSCORE_QUICK[scope], trees)
    scaled, _ = run(ZSCORE_QUICK[scope], scaled_trees)
    assert int(states[-1].clipped_total) >= 3
    chex.assert_trees_all_equal(scaled, jax.tree.map(lambda x: x * factor, updates))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_leaves_whose_norm_exceeds_their_dtype_are_clipped(dtype):
    grads = {"w": jnp.full((50_000,), 300.0, dtype)}  # norm 67 082 > 65 504
    updates, state = clip(clip_at(1.0), grads)
    assert updates["w"].dtype == dtype
    assert float(state.norm) == pytest.approx(300 * np.sqrt(50_000), rel=ROUNDING)
    assert norm_of(updates) == pytest.approx(1.0, rel=SLACK[dtype])


def test_leaves_of_several_dtypes_are_measured_together():
    grads = {
        "a": jnp.full((4,), 3.0, jnp.bfloat16),
        "b": jnp.full((4,), 4.0, jnp.float16),
        "c": jnp.zeros((2,), jnp.float32),
    }
    updates, state = clip(clip_at(1.0), grads)
    assert float(state.norm) == pytest.approx(10.0, rel=ROUNDING)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    chex.assert_trees_all_close(updates["a"].astype("f4"), jnp.full(4, 0.3), rtol=4e-3)


# --- nothing to clip -------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize(
    "grads",
    [{}, (), {"a": None}, {"a": jnp.zeros((0, 3))}, {"a": jnp.zeros((2,)), "b": None}],
    ids=["empty dict", "empty tuple", "None", "empty leaf", "zeros"],
)
def test_what_has_no_length_passes_and_has_norm_zero(grads, scope):
    tx = ZSCORE_QUICK[scope]
    updates, state = clip(tx, grads)
    chex.assert_trees_all_equal(updates, grads)
    assert float(state.norm) == 0.0
    assert int(state.nonfinite_total) == int(state.clipped_total) == 0
    chex.assert_trees_all_equal(state.threshold, tx.init(grads).threshold)
    chex.assert_tree_all_finite(state.metrics["clip/fraction"])


def test_an_empty_leaf_beside_others_changes_nothing():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros((0, 2))}
    updates, _ = clip(clip_at(1.0), grads)
    chex.assert_trees_all_close(updates["a"], jnp.array([0.6, 0.8]), rtol=ROUNDING)
    assert updates["b"].shape == (0, 2)


# --- derivatives -----------------------------------------------------------------


@pytest.mark.parametrize("limit", [1.0, 100.0], ids=["active", "inactive"])
def test_the_derivative_is_that_of_the_rule(limit):
    weights, grads = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, -2.0])
    tx = clip_at(limit)

    def loss(g):
        return jnp.asarray(weights) @ tx.update({"g": g}, tx.init({"g": g}))[0]["g"]

    found = jax.jit(jax.grad(loss))(jnp.asarray(grads))
    norm = 3.0
    expected = limit * (weights / norm - grads * (weights @ grads) / norm**3)
    np.testing.assert_allclose(
        found, expected if norm > limit else weights, rtol=1e-5, atol=ROUNDING
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e20])
def test_the_derivative_is_finite(scale, scope):
    tx = clip_at(1.0, scope)

    def loss(grads):
        updates, _ = tx.update(grads, tx.init(grads))
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    found = jax.jit(jax.grad(loss))(random_tree(scale=scale))
    chex.assert_tree_all_finite(found)


# --- metrics ---------------------------------------------------------------------


def test_the_counts_of_several_steps():
    values = [0.5, 2.0, np.nan, 3.0, np.inf, 0.1]
    _, states = run(clip_at(1.0), [{"w": jnp.array([value])} for value in values])
    found = [{k: float(v) for k, v in state.metrics.items()} for state in states]
    np.testing.assert_array_equal([each["clip/norm"] for each in found], values)
    np.testing.assert_array_equal([each["clip/limit"] for each in found], 1.0)
    np.testing.assert_allclose(
        [each["clip/fraction"] for each in found],
        [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5, 2 / 6],
        rtol=ROUNDING,
    )
    np.testing.assert_array_equal(
        [each["clip/nonfinite_total"] for each in found], [0, 0, 1, 1, 2, 2]
    )
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6]


def test_a_step_counts_once_however_many_scopes_are_clipped_or_not_finite():
    grads = {name: jnp.array([5.0]) for name in "abc"}
    bad = grads | {"a": jnp.array([np.nan]), "b": jnp.array([np.inf])}
    _, states = run(clip_at(1.0, "leaf"), [grads, bad])
    assert int(states[-1].clipped_total) == 2
    assert int(states[-1].nonfinite_total) == 1


def test_a_step_whose_only_event_is_not_finite_is_not_called_clipped():
    _, states = run(clip_at(1.0), [{"w": jnp.array([np.inf])}])
    assert int(states[-1].clipped_total) == 0


def test_metrics_per_leaf_are_named_after_their_leaves():
    grads = random_tree()
    _, state = clip(clip_at(1.0, "leaf"), grads)
    found = ost.metrics(state, params=grads)
    _, norms = reference(grads, 1.0, "leaf")
    for name, norm in zip(ost.leaf_names(grads), norms, strict=True):
        assert float(found[f"clip/norm/{name}"]) == pytest.approx(norm, rel=ROUNDING)
        assert float(found[f"clip/limit/{name}"]) == 1.0


@pytest.mark.parametrize("scope", SCOPES)
def test_the_metric_keys_never_change(scope):
    tx, grads = clip_at(1.0, scope), random_tree()
    fresh = tx.init(grads).metrics
    _, state = clip(tx, grads)
    names = {"clip/norm", "clip/limit", "clip/fraction", "clip/nonfinite_total"}
    if scope != "global":
        names |= {"clip/norm/per_leaf", "clip/limit/per_leaf"}
    assert fresh.keys() == state.metrics.keys() == names
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, state.metrics)
    chex.assert_tree_all_finite(fresh)


# --- clip_by_zscore --------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"z_max": 1.0},
        {"decay": 0.5},
        {"warmup": 2},
        {"mode": "mean"},
        {"mode": "max"},
        {"relearn_after": 2},
        {"relearn_after": None},
        {"scope": "leaf"},
    ],
    ids=str,
)
def test_clip_by_zscore_is_the_composition(settings):
    settings = {"warmup": 3} | settings
    parts = {"relearn_after": 25, "scope": "global"} | settings
    after, scope = parts.pop("relearn_after"), parts.pop("scope")
    threshold = thresholds.zscore(**parts)
    if after is not None:
        threshold = thresholds.relearn(threshold, after=after)
    composed = ost.clip_by_threshold(threshold, scope=scope)
    trees = [random_tree(seed) for seed in range(6)] + [random_tree(6, scale=9.0)] * 5
    chex.assert_trees_all_equal(
        run(ost.clip_by_zscore(**settings), trees), run(composed, trees)
    )


def test_clip_by_zscore_defaults_are_zclip_with_a_way_out():
    written_out = ost.clip_by_zscore(
        2.5, decay=0.97, warmup=25, mode="adaptive", relearn_after=25, scope="global"
    )
    trees = [{"w": jnp.array([1 + 0.1 * (i % 7)])} for i in range(30)]
    trees += [{"w": jnp.array([20.0])}] * 30
    updates, states = run(ost.clip_by_zscore(), trees)
    chex.assert_trees_all_equal((updates, states), run(written_out, trees))
    values = np.array([float(update["w"][0]) for update in updates])
    assert (values[30:55] < 5).all()
    assert (values[55:] == 20.0).all()


def test_without_relearning_a_lasting_rise_is_clipped_for_ever():
    tx = ost.clip_by_zscore(warmup=5, relearn_after=None)
    trees = [{"w": jnp.array([1 + 0.1 * (i % 7)])} for i in range(30)]
    trees += [{"w": jnp.array([20.0])}] * 60
    updates, states = run(tx, trees)
    assert isinstance(states[-1].threshold, thresholds.ZScoreState)
    assert all(float(update["w"][0]) < 5 for update in updates[30:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hyperparameters_can_be_injected(dtype):
    params = random_tree(dtype=dtype)
    injected = optax.inject_hyperparams(ost.clip_by_zscore)(z_max=2.0, decay=0.9375)
    state = injected.init(params)

    @jax.jit
    def scan(state, trees):
        return jax.lax.scan(lambda s, g: injected.update(g, s)[::-1], state, trees)

    trees = [random_tree(seed, dtype=dtype) for seed in range(27)]
    trees += [random_tree(27, scale=20.0, dtype=dtype)] * 3
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    final, _ = scan(state, stacked)
    _, states = run(ost.clip_by_zscore(2.0, decay=0.9375), trees)
    # Equal but for the rounding of other fusions.
    chex.assert_trees_all_close(
        final.inner_state.metrics, states[-1].metrics, rtol=1e-4
    )
    assert int(final.inner_state.clipped_total) == 3


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1.0, None, "global", thresholds.zscore])
def test_what_is_no_threshold_raises_and_names_the_remedy(threshold):
    with pytest.raises(TypeError, match=r"thresholds\.constant\(limit\)") as raised:
        ost.clip_by_threshold(threshold)
    assert repr(threshold) in str(raised.value)


@pytest.mark.parametrize("scope", ["leaves", "", None])
def test_an_unknown_scope_raises_and_lists_the_known_ones(scope):
    for make in (
        lambda: ost.clip_by_threshold(thresholds.constant(1.0), scope=scope),
        lambda: ost.clip_by_zscore(scope=scope),
    ):
        with pytest.raises(ValueError, match="'global', 'leaf'") as raised:
            make()
        assert f"scope={scope!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("z_max", 0.0),
        ("decay", 1.0),
        ("warmup", 0),
        ("mode", "median"),
        ("relearn_after", 0),
    ],
)
def test_clip_by_zscore_names_the_argument_that_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=name) as raised:
        ost.clip_by_zscore(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
