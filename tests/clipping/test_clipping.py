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
from tiers import full, quick_only

import optax_stability as ost
from optax_stability import thresholds

# A norm of a few dozen float32 squares, a quotient and a product.
ROUNDING = 1e-6
# Half a spacing of the dtype per entry, and ROUNDING.
SLACK = {jnp.float32: 2e-6, jnp.bfloat16: 4e-3, jnp.float16: 1e-3}

# Statistics of a few steps: rounding of the norms over a deviation of a tenth of them.
STATISTICS = 1e-4

SCOPES = {
    "global": "global",
    "leaf": "leaf",
    "labels": lambda tree: jax.tree.map(
        lambda x: "flat" if x.ndim < 2 else "deep", tree
    ),
    "prefix": lambda tree: {"head": "slow", "body": "fast"},
}


def random_tree(seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return np.asarray(scale * rng.standard_normal(shape), np.float32).astype(dtype)

    body = {"w": leaf(4, 3), "b": leaf(3), "layers": [leaf(2, 2, 2), leaf()]}
    return {"head": {"w": leaf(3, 5)}, "body": body}


@functools.partial(jax.jit, static_argnames="scope")
def clip_at(limit, grads, scope="global"):
    """The first step with a constant limit."""
    tx = ost.clip_by_threshold(thresholds.constant(limit), scope=SCOPES[scope])
    return tx.update(grads, tx.init(grads))


@functools.cache
def compiled(function, **options):
    return jax.jit(function, compiler_options=options or None)


def run(tx, trees, state=None, **options):
    """The updates and states of several steps, compiled with these options."""
    state = compiled(tx.init)(trees[0]) if state is None else state
    updates, states = [], []
    for grads in trees:
        update, state = compiled(tx.update, **options)(grads, state)
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


QUICK = {
    scope: ost.clip_by_zscore(warmup=2, relearn_after=3, scope=scope)
    for scope in ("global", "leaf")
}


# --- the rule --------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-3, 1.0, 4.0, 1e3])
def test_a_constant_limit_equals_clip_by_global_norm_of_optax(limit):
    grads = random_tree()
    expected, _ = compiled(optax.clip_by_global_norm(limit).update)(grads, ())
    updates, _ = clip_at(limit, grads)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING)


@pytest.mark.parametrize("limit", [0.5, 2.0, 3.0, 100.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_is_clipped_by_its_own_norm(scope, limit):
    grads = random_tree()
    expected, norms = reference(grads, limit, scope)
    updates, state = clip_at(limit, grads, scope)
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
    threshold = thresholds.zscore(warmup=2)
    trees = [random_tree(seed) for seed in range(6)]
    tx = ost.clip_by_threshold(threshold, scope=SCOPES["labels"])
    _, states = run(tx, trees)
    labels = labels_of(trees[0], "labels")
    for number, label in enumerate(dict.fromkeys(labels)):
        alone, place = threshold.init(), labels.index(label)
        for tree in trees:
            norm = reference(tree, 1.0, "labels")[1][place]
            limit, alone = compiled(threshold.update)(norm, alone)
        found = jax.tree.map(lambda x, i=number: x[i], states[-1].threshold)
        chex.assert_trees_all_close(found, alone, rtol=STATISTICS)
        found_limit = float(states[-1].leaf_limit[place])
        assert found_limit == pytest.approx(float(limit), rel=STATISTICS)


@hypothesis.settings(derandomize=True, max_examples=50, deadline=None)
@hypothesis.given(
    values=hnp.arrays(
        np.float32, 8, elements=st.floats(-(2.0**123), 2.0**123, width=32)
    ),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(list(SLACK)),
)
def test_the_norm_after_clipping_is_at_most_the_limit(values, exponent, dtype):
    largest = float(jnp.finfo(dtype).max)
    values = np.clip(values, -largest, largest).astype(dtype)
    limit = np.float32(2.0**exponent)
    updates, _ = clip_at(limit, {"a": values[:3], "b": values[3:]})
    # Entries that the dtype holds as subnormal numbers are rounded to its smallest.
    smallest = np.sqrt(8) * float(jnp.finfo(dtype).smallest_subnormal)
    assert norm_of(updates) <= limit * (1 + SLACK[dtype]) + smallest
    assert updates["a"].dtype == updates["b"].dtype == dtype


# --- inactive is identity --------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scope"),
    [*((dtype, "global") for dtype in SLACK), *((jnp.float32, s) for s in SCOPES)],
)
def test_inactive_is_identity_bit_for_bit(dtype, scope):
    grads = random_tree(dtype=dtype)
    grads["body"]["b"] = np.array([-0.0, 0.0, 1e-7], np.float32).astype(dtype)
    updates, _ = clip_at(100.0, grads, scope)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    assert bits(updates) == bits(grads)


def test_a_norm_at_the_limit_is_not_clipped():
    grads = {"w": np.array([3.0, 4.0], np.float32)}
    updates, state = clip_at(5.0, grads)
    assert bits(updates) == bits(grads)
    assert int(state.clipped_total) == 0


def test_inactive_is_identity_for_float64():
    with jax.enable_x64(True):
        grads = {"w": np.array([0.1, -0.3])}
        updates, _ = clip_at(100.0, grads)
        assert bits(updates) == bits(grads)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_nothing_of_the_level_so_far_is_clipped_in_the_warm_up(scope):
    tx = ost.clip_by_zscore(warmup=2, at_most_median=False, scope=scope)
    trees = [random_tree(scale=4.0**power) for power in range(2)]
    updates, states = run(tx, trees)
    assert bits(updates) == bits(trees)
    assert int(states[-1].clipped_total) == 0
    assert float(states[-1].limit) == np.inf


# --- gradients that are not finite -----------------------------------------------


def poison(tree, bad):
    """Puts one bad number into the leaf body/w."""
    w = tree["body"]["w"].copy()
    w[1, 2] = bad
    return tree | {"body": tree["body"] | {"w": w}}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_gradient_that_is_not_finite_gives_zeros_for_its_scope_alone(scope, bad):
    grads = random_tree()
    updates, state = clip_at(2.0, poison(grads, bad), scope)
    clean, _ = clip_at(2.0, grads, scope)
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
    tx, state = QUICK[scope], QUICK[scope].init(random_tree())
    hit = ost.leaf_names(random_tree()).index("body/w") if scope == "leaf" else 0
    for seed in range(5):  # step 0, the warm-up and armed steps
        grads = random_tree(seed)
        _, (poisoned,) = run(tx, [poison(grads, bad)], state)
        _, (clean,) = run(tx, [grads], state)
        expected = jax.tree.map(
            lambda new, old: np.concatenate([new[:hit], old[hit:][:1], new[hit + 1 :]]),
            clean.threshold,
            state.threshold,
        )
        chex.assert_trees_all_equal(poisoned.threshold, expected)
        state = clean


def test_training_goes_on_after_gradients_that_are_not_finite():
    trees = [random_tree(seed) for seed in range(8)]
    bad = [poison(trees[4], np.nan), poison(trees[5], np.inf)]
    updates, states = run(QUICK["global"], [*trees[:4], *bad, *trees[4:]])
    expected, expected_states = run(QUICK["global"], trees)
    chex.assert_trees_all_equal(updates[6:], expected[4:])
    chex.assert_trees_all_equal(states[-1].threshold, expected_states[-1].threshold)


# --- any size --------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_an_entry_whose_square_overflows_is_clipped_like_any_other(scope):
    grads = random_tree()
    grads["body"]["b"] = np.array([0.5, -1e20, 2.0], np.float32)
    updates, state = clip_at(1.0, grads, scope)
    expected, _ = reference(grads, 1.0, scope)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING, atol=0.0)
    assert float(state.norm) == pytest.approx(1e20, rel=ROUNDING)
    assert int(state.nonfinite_total) == 0


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_gradient_of_any_size_is_clipped_to_a_limit_of_its_size(scope, scale):
    grads = random_tree(scale=scale)
    limit = float(np.float32(0.5 * scale))
    updates, state = clip_at(limit, grads, scope)
    expected, _ = reference(grads, limit, scope)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING, atol=0.0)
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)


@pytest.mark.parametrize("largest", [1e30, 5e37])
def test_the_largest_finite_gradients_keep_their_direction(largest):
    grads = {"w": np.array([largest, -0.5 * largest, 0.0], np.float32)}
    updates, state = clip_at(1.0, grads)
    expected, _ = reference(grads, 1.0, "global")
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)
    chex.assert_trees_all_close(updates, expected, rtol=ROUNDING)


@pytest.mark.parametrize("exponent", [-90, -50, 60])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_power_of_two_scales_every_clipped_update_bit_for_bit(scope, exponent):
    trees = [random_tree(seed) for seed in range(5)] + [random_tree(5, scale=30.0)] * 6
    factor = np.float32(2.0**exponent)
    scaled_trees = jax.tree.map(lambda x: x * factor, trees)
    # As users compile it: without LLVM's optimizations subnormal numbers may differ.
    optimized = {"xla_backend_optimization_level": 3}
    updates, states = run(QUICK[scope], trees, **optimized)
    scaled, _ = run(QUICK[scope], scaled_trees, **optimized)
    assert int(states[-1].clipped_total) >= 3
    chex.assert_trees_all_equal(scaled, jax.tree.map(lambda x: x * factor, updates))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_leaves_whose_norm_exceeds_their_dtype_are_clipped(dtype):
    grads = {"w": jnp.full((50_000,), 300.0, dtype)}  # norm 67 082 > 65 504
    updates, state = clip_at(1.0, grads)
    assert updates["w"].dtype == dtype
    assert float(state.norm) == pytest.approx(300 * np.sqrt(50_000), rel=ROUNDING)
    assert norm_of(updates) == pytest.approx(1.0, rel=SLACK[dtype])


def test_leaves_of_several_dtypes_are_measured_together():
    grads = {
        "a": jnp.full((4,), 3.0, jnp.bfloat16),
        "b": jnp.full((4,), 4.0, jnp.float16),
        "c": jnp.zeros((2,), jnp.float32),
    }
    updates, state = clip_at(1.0, grads)
    assert float(state.norm) == pytest.approx(10.0, rel=ROUNDING)
    chex.assert_trees_all_equal_dtypes(updates, grads)
    for name, expected in (("a", 0.3), ("b", 0.4)):
        found = np.asarray(updates[name]).astype(np.float32)
        np.testing.assert_allclose(found, expected, rtol=SLACK[jnp.bfloat16])


# --- nothing to clip -------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize(
    "grads",
    [{}, {"a": None, "b": np.zeros((0, 3), np.float32), "c": np.zeros(2, np.float32)}],
    ids=["no leaf", "None, an empty leaf and zeros"],
)
def test_what_has_no_length_passes_and_is_not_learned(grads, scope):
    updates, (state,) = run(QUICK[scope], [grads])
    chex.assert_trees_all_equal(updates, [grads])
    assert float(state.norm) == 0.0
    assert int(state.nonfinite_total) == int(state.clipped_total) == 0
    chex.assert_trees_all_equal(state.threshold, QUICK[scope].init(grads).threshold)


def test_an_empty_leaf_beside_others_changes_nothing():
    grads = {"a": np.array([3.0, 4.0], np.float32), "b": np.zeros((0, 2), np.float32)}
    updates, _ = clip_at(1.0, grads)
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=ROUNDING)
    assert updates["b"].shape == (0, 2)


# --- derivatives -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="scope")
def derivative(weights, limit, grads, scope="global"):
    """The derivative of Σ weight·update by the gradient."""

    def loss(grads):
        products = jax.tree.map(jnp.vdot, weights, clip_at(limit, grads, scope)[0])
        return sum(jax.tree.leaves(products))

    return jax.grad(loss)(grads)


@pytest.mark.parametrize("limit", [1.0, 100.0], ids=["active", "inactive"])
def test_the_derivative_is_that_of_the_rule(limit):
    weights, grads = np.array([1.0, -2.0, 0.5], "f4"), np.array([2.0, 1.0, -2.0], "f4")
    norm = 3.0
    expected = limit * (weights / norm - grads * (weights @ grads) / norm**3)
    expected = expected if norm > limit else weights
    found = derivative({"w": weights}, limit, {"w": grads})["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=ROUNDING)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e20])
def test_the_derivative_is_finite(scale, scope):
    grads = random_tree(scale=scale)
    weights = jax.tree.map(np.ones_like, grads)
    found = derivative(weights, 1.0, grads, scope)
    chex.assert_tree_all_finite(found)
    if scale == 0:  # the gradient of the identity
        chex.assert_trees_all_equal(found, weights)


# --- metrics ---------------------------------------------------------------------


def test_the_counts_of_several_steps():
    values = np.array([0.5, 2.0, np.nan, 3.0, np.inf, 0.1], np.float32)
    tx = ost.clip_by_threshold(thresholds.constant(1.0))
    _, states = run(tx, [{"w": value[None]} for value in values])
    found = [state.metrics for state in states]
    columns = {key: np.array([each[key] for each in found]) for key in found[0]}
    np.testing.assert_array_equal(columns["clip/norm"], values)
    np.testing.assert_array_equal(columns["clip/limit"], 1.0)
    np.testing.assert_array_equal(columns["clip/nonfinite_total"], [0, 0, 1, 1, 2, 2])
    shares = [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5, 2 / 6]
    np.testing.assert_allclose(columns["clip/fraction"], shares, rtol=ROUNDING)
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6]


def test_a_step_counts_once_however_many_scopes_are_clipped_or_not_finite():
    bad, large = np.array([np.nan], "f4"), np.array([5.0], "f4")
    tx = ost.clip_by_threshold(thresholds.constant(1.0), scope="leaf")
    trees = [dict.fromkeys("abc", large), dict.fromkeys("ab", bad) | {"c": large}]
    _, states = run(tx, trees)
    assert [int(state.clipped_total) for state in states] == [1, 2]
    assert [int(state.nonfinite_total) for state in states] == [0, 1]


def test_metrics_per_leaf_are_named_after_their_leaves():
    grads = random_tree()
    found = ost.metrics(clip_at(1.0, grads, "leaf")[1], params=grads)
    _, norms = reference(grads, 1.0, "leaf")
    for name, norm in zip(ost.leaf_names(grads), norms, strict=True):
        assert float(found[f"clip/norm/{name}"]) == pytest.approx(norm, rel=ROUNDING)
        assert float(found[f"clip/limit/{name}"]) == 1.0


@pytest.mark.parametrize("scope", SCOPES)
def test_the_metric_keys_never_change(scope):
    grads = random_tree()
    tx = ost.clip_by_threshold(thresholds.constant(1.0), scope=SCOPES[scope])
    fresh, updated = tx.init(grads).metrics, clip_at(1.0, grads, scope)[1].metrics
    names = {"clip/norm", "clip/limit", "clip/fraction", "clip/nonfinite_total"}
    if scope != "global":
        names |= {"clip/norm/per_leaf", "clip/limit/per_leaf"}
    assert fresh.keys() == updated.keys() == names
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, updated)
    chex.assert_tree_all_finite(fresh)


# --- clip_by_zscore --------------------------------------------------------------


def computation(tx, grads=None):
    """What init and update compute, as text."""
    grads = random_tree() if grads is None else grads
    state = jax.eval_shape(tx.init, grads)
    return str(jax.make_jaxpr(tx.init)(grads)), str(
        jax.make_jaxpr(tx.update)(grads, state)
    )


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
        {"at_most_median": False},
        {"scope": "leaf"},
        {"scope": SCOPES["labels"]},
    ],
    ids=" ".join,
)
@quick_only("scope0", "decay", "at_most_median")
def test_clip_by_zscore_is_the_composition(settings):
    published = {"z_max": 2.5, "decay": 0.97, "warmup": 25, "mode": "adaptive"}
    written_out = published | {"relearn_after": 25, "scope": "global"} | settings
    after, scope = written_out.pop("relearn_after"), written_out.pop("scope")
    evens_out = written_out.pop("at_most_median", True)
    threshold = thresholds.zscore(**written_out)
    if after is not None:
        threshold = thresholds.relearn(threshold, after=after)
    if evens_out:
        threshold = thresholds.at_most_median(threshold, window=16)
    composed = computation(ost.clip_by_threshold(threshold, scope=scope))
    assert computation(ost.clip_by_zscore(**settings)) == composed
    if settings:
        assert computation(ost.clip_by_zscore()) != composed


def rising_norms():
    """Thirty norms near 1, then many of 20."""
    low = [{"w": np.array([1 + 0.1 * (i % 7)], np.float32)} for i in range(30)]
    return low + [{"w": np.array([20.0], np.float32)}] * 60


def test_a_lasting_rise_is_clipped_for_25_steps_and_then_accepted():
    updates, _ = run(ost.clip_by_zscore(), rising_norms())
    values = np.array([update["w"][0] for update in updates])
    assert (values[30:55] < 5).all()
    assert (values[55 + 9 :] == 20).all()  # Then most of the last 16 norms are new.
    outliers_alone, _ = run(ost.clip_by_zscore(at_most_median=False), rising_norms())
    assert all(update["w"][0] == 20 for update in outliers_alone[55:])


def test_without_relearning_a_lasting_rise_is_clipped_for_ever():
    updates, states = run(ost.clip_by_zscore(relearn_after=None), rising_norms())
    assert isinstance(states[-1].threshold.inner, thresholds.ZScoreState)
    assert all(update["w"][0] < 5 for update in updates[30:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@quick_only("float32")
def test_hyperparameters_can_be_injected(dtype):
    settings = {"z_max": 2.0, "decay": 0.9375, "warmup": 3}  # exact in bfloat16
    injected = optax.inject_hyperparams(ost.clip_by_zscore)(**settings)
    trees = jax.tree.map(lambda x: x.astype(dtype), rising_norms()[:40])
    updates, states = run(injected, trees)
    expected, expected_states = run(ost.clip_by_zscore(**settings), trees)
    chex.assert_trees_all_close(updates, expected, rtol=SLACK[dtype])
    assert expected_states[-1].clipped_total > 5
    chex.assert_trees_all_close(
        states[-1].inner_state, expected_states[-1], rtol=STATISTICS
    )


# --- clip_by_quantile and clip_by_leaf_history ------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q": 0.9},
        {"window": 16},
        {"scope": "leaf"},
        {"scope": SCOPES["labels"]},
        {"scope": "leaf", "stacked": True},
    ],
    ids=" ".join,
)
def test_clip_by_quantile_is_the_composition(settings):
    settings = {"q": 0.1} | settings
    written_out = {"window": 128, "scope": "global", "stacked": None} | settings
    q, window = written_out.pop("q"), written_out.pop("window")
    threshold = thresholds.window_quantile(q, window=window)
    grads = stacked_tree()
    composed = computation(ost.clip_by_threshold(threshold, **written_out), grads)
    assert computation(ost.clip_by_quantile(**settings), grads) == composed
    if len(settings) > 1 or settings["q"] != 0.1:
        assert computation(ost.clip_by_quantile(0.1), grads) != composed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio": 1.5},
        {"decay": 0.5},
        {"warmup": 2},
        {"relearn_after": 2},
        {"relearn_after": None},
        {"stacked": True},
    ],
    ids=str,
)
def test_clip_by_leaf_history_is_the_composition(settings):
    published = {"ratio": 1.05, "decay": 0.98, "warmup": 100}
    written_out = published | {"relearn_after": 25, "stacked": None} | settings
    after, stacked = written_out.pop("relearn_after"), written_out.pop("stacked")
    threshold = thresholds.ema_ratio(**written_out)
    if after is not None:
        threshold = thresholds.relearn(threshold, after=after)
    grads = stacked_tree()
    tx = ost.clip_by_threshold(threshold, scope="leaf", stacked=stacked)
    composed = computation(tx, grads)
    assert computation(ost.clip_by_leaf_history(**settings), grads) == composed
    if settings:
        assert computation(ost.clip_by_leaf_history(), grads) != composed


PRESETS = {
    "zscore": ost.clip_by_zscore,
    "quantile": functools.partial(ost.clip_by_quantile, 0.5),
    "leaf history": ost.clip_by_leaf_history,
}


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS.keys())
@quick_only("leaf history")
def test_a_preset_sums_over_the_named_axes(make):
    tx = make(axis_name="shards")
    grads = {"w": np.array([[3.0], [4.0]], np.float32)}
    state = tx.init({"w": grads["w"][0]})
    update = jax.vmap(tx.update, in_axes=(0, None), axis_name="shards")
    _, found = update(grads, state)
    np.testing.assert_allclose(found.norm, 5.0, rtol=ROUNDING)


def test_clip_by_quantile_clips_to_the_quantile_of_the_past():
    norms = np.array([4.0, 1.0, 3.0, 2.0, 9.0, 0.5, 9.0], np.float32)
    tx = ost.clip_by_quantile(0.5, window=4)
    updates, _ = run(tx, [{"w": np.array([0.0, norm], np.float32)} for norm in norms])
    # Medians of (4, 1), (4, 1, 3), (4, 1, 3, 2), (1, 3, 2, 9), (3, 2, 9, ½).
    expected = [4.0, 1.0, 2.5, 2.0, 2.5, 0.5, 2.5]
    found = [update["w"][1] for update in updates]
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def leaf_history_of(small, *, waiting, steps, **settings):
    """What a leaf with gradient 1 moves by after ``waiting`` steps of ``small``."""
    tx = ost.clip_by_leaf_history(warmup=3, **settings)
    values = np.where(np.arange(waiting + steps) < waiting, small, 1.0)
    trees = [{"late": np.array([v], "f4"), "b": np.ones(2, "f4")} for v in values]
    updates, states = run(tx, trees)
    for update in updates:  # the other leaf does not notice
        np.testing.assert_array_equal(update["b"], 1)
    moved = np.array([update["late"][0] for update in updates])
    return moved[waiting:], states


def test_a_leaf_without_a_gradient_in_the_warm_up_is_not_frozen_by_it():
    for after in (4, None):
        moved, states = leaf_history_of(0.0, waiting=8, steps=8, relearn_after=after)
        np.testing.assert_array_equal(moved, 1.0)
        assert int(states[-1].clipped_total) == 0


def test_a_leaf_that_was_tiny_in_the_warm_up_moves_at_full_size_after_a_row():
    moved, _ = leaf_history_of(0.1, waiting=8, steps=8, relearn_after=4)
    assert (moved[:4] < 0.11).all()
    np.testing.assert_array_equal(moved[4:], 1.0)


def test_a_leaf_that_was_tiny_in_the_warm_up_rises_by_squares_from_row_to_row():
    moved, _ = leaf_history_of(1e-5, waiting=8, steps=16, relearn_after=4)
    for row, size in enumerate((1e-5, 1e-4, 1e-2)):
        # Each level is the limit before it, 5 % above the level, times the rise.
        expected = 1.05 ** (row + 1) * size
        np.testing.assert_allclose(moved[4 * row : 4 * row + 4], expected, rtol=0.01)
    np.testing.assert_array_equal(moved[12:], 1.0)


def test_without_relearning_a_leaf_follows_by_a_thousandth_a_step_as_published():
    moved, states = leaf_history_of(0.1, waiting=8, steps=60, relearn_after=None)
    assert isinstance(states[-1].threshold, thresholds.EmaRatioState)
    np.testing.assert_allclose(moved, 0.105 * 1.001 ** np.arange(60), rtol=1e-5)


# --- stacked layers --------------------------------------------------------------

LAYERS = 3
STACKED = {"blocks": True, "head": False}
AS_ASKED = {
    "a prefix tree": STACKED,
    "a full tree": {"blocks": {"b": True, "w": True}, "head": False},
    "a callable": lambda tree: {"blocks": True, "head": False},
    "a callable by leaf": lambda tree: jax.tree.map(lambda x: x.shape[0] == 3, tree),
}


def stacked_tree(seed=0, scale=1.0):
    """Three layers of two leaves, each layer of its own size, and a head."""
    rng = np.random.default_rng(seed)
    sizes = np.array([1.0, 30.0, 0.01], np.float32)

    def leaf(*shape):
        layers = np.asarray(scale * rng.standard_normal((LAYERS, *shape)), np.float32)
        return layers * sizes.reshape(-1, *[1] * len(shape))

    return {"blocks": {"b": leaf(5), "w": leaf(4, 5)}, "head": leaf(2)[0]}


def unstacked(tree):
    """The same with a leaf for every layer, in the same order."""
    blocks = {name: list(leaf) for name, leaf in tree["blocks"].items()}
    return tree | {"blocks": blocks}


def layered(threshold, stacked=None):
    return ost.clip_by_threshold(threshold, scope="leaf", stacked=stacked)


ADAPTIVE = thresholds.relearn(thresholds.zscore(warmup=2), after=3)
ADAPTIVE_STACKED = layered(ADAPTIVE, STACKED)
STACKED_AT_1 = layered(thresholds.constant(1.0), STACKED)


@full
def test_layers_of_a_stacked_leaf_are_clipped_like_leaves_of_their_own():
    trees = [stacked_tree(seed, scale=1 + 4 * (seed > 3)) for seed in range(9)]
    trees[5]["blocks"]["w"][1] *= 100
    updates, states = run(ADAPTIVE_STACKED, trees)
    expected, expected_states = run(layered(ADAPTIVE), [unstacked(t) for t in trees])
    assert 2 < int(states[-1].clipped_total) < 9
    for found, wanted in zip(updates, expected, strict=True):
        chex.assert_trees_all_close(unstacked(found), wanted, rtol=STATISTICS)
    for found, wanted in zip(states, expected_states, strict=True):
        chex.assert_trees_all_close(found.threshold, wanted.threshold, rtol=STATISTICS)
        found, wanted = found.metrics, wanted.metrics
        for key in ("clip/norm", "clip/limit", "clip/fraction"):
            np.testing.assert_allclose(found[key], wanted[key], rtol=STATISTICS)


@pytest.mark.parametrize("stacked", AS_ASKED.values(), ids=AS_ASKED.keys())
def test_stacked_leaves_are_named_by_a_tree_a_prefix_or_a_callable(stacked):
    grads = stacked_tree()
    tx = layered(thresholds.constant(1.0), stacked)
    assert computation(tx, grads) == computation(STACKED_AT_1, grads)


def test_without_a_mark_no_leaf_is_stacked():
    grads = stacked_tree()
    plain = computation(layered(thresholds.constant(1.0)), grads)
    assert computation(layered(thresholds.constant(1.0), False), grads) == plain
    assert computation(STACKED_AT_1, grads) != plain


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_that_is_not_finite_gives_zeros_alone(bad):
    grads = stacked_tree()
    clean, _ = compiled(STACKED_AT_1.update)(grads, STACKED_AT_1.init(grads))
    expected = jax.tree.map(np.array, clean)
    expected["blocks"]["w"][1] = 0.0
    grads["blocks"]["w"][1, 2, 3] = bad
    found, state = compiled(STACKED_AT_1.update)(grads, STACKED_AT_1.init(grads))
    chex.assert_trees_all_equal(found, expected)
    assert int(state.nonfinite_total) == 1

    tx = ADAPTIVE_STACKED
    before = run(tx, [stacked_tree(seed) for seed in range(4)])[1][-1]
    _, after = compiled(tx.update)(grads, before)
    names = ["b0", "b1", "b2", "w0", "w1", "w2", "head"]
    learned = after.threshold.inner.step - before.threshold.inner.step
    assert dict(zip(names, learned.tolist(), strict=True)) == {
        name: int(name != "w1") for name in names
    }


def test_a_layer_of_any_size_is_measured_right():
    grads = stacked_tree()
    grads["blocks"]["w"][2, 0, 0] = 1e20
    updates, _ = compiled(STACKED_AT_1.update)(grads, STACKED_AT_1.init(grads))
    expected, _ = reference(unstacked(grads), 1.0, "leaf")
    chex.assert_trees_all_close(unstacked(updates), expected, rtol=ROUNDING)


def test_metrics_per_leaf_join_the_layers():
    grads = stacked_tree()
    threshold = thresholds.relearn(thresholds.constant(2.0), after=9)
    tx = layered(threshold, STACKED)
    _, state = compiled(tx.update)(grads, tx.init(grads))
    found = ost.metrics(state, params=grads)
    assert state.leaf_norm.shape == state.leaf_limit.shape == (3,)
    assert state.threshold.above.shape == (7,)
    for name, leaf, layers in (
        ("blocks/b", grads["blocks"]["b"], LAYERS),
        ("blocks/w", grads["blocks"]["w"], LAYERS),
        ("head", grads["head"], 1),
    ):
        norm, limit = norm_of(leaf), 2.0 * np.sqrt(layers)
        assert float(found[f"clip/norm/{name}"]) == pytest.approx(norm, rel=ROUNDING)
        assert float(found[f"clip/limit/{name}"]) == pytest.approx(limit, rel=ROUNDING)
    assert float(state.norm) == pytest.approx(norm_of(grads), rel=ROUNDING)
    assert float(state.limit) == pytest.approx(2 * np.sqrt(7), rel=ROUNDING)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(grads), state)


@pytest.mark.parametrize("layers", [0, 1, 4])
@pytest.mark.parametrize("beside", [{}, {"z": np.array([6.0, 8.0], np.float32)}])
def test_any_number_of_layers_alone_or_beside_a_leaf(layers, beside):
    grads = {"w": np.full((layers, 4), 5.0, np.float32)} | beside
    tx = layered(thresholds.constant(1.0), {"w": True} | dict.fromkeys(beside, False))
    updates, state = compiled(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(updates["w"], np.full((layers, 4), 0.5), rtol=ROUNDING)
    if beside:
        np.testing.assert_allclose(updates["z"], [0.6, 0.8], rtol=ROUNDING)
    norms = [10 * np.sqrt(layers), *([10.0] if beside else [])]
    np.testing.assert_allclose(state.leaf_norm, norms, rtol=ROUNDING)


def test_a_stacked_vector_is_clipped_entry_by_entry():
    grads = {"scale": np.array([0.5, -3.0, np.nan, 2.0], np.float32)}
    tx = layered(thresholds.constant(1.0), True)
    updates, _ = compiled(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(updates["scale"], [0.5, -1.0, 0.0, 1.0], rtol=ROUNDING)


def test_inactive_stacked_layers_are_kept_bit_for_bit():
    grads = stacked_tree(scale=1e-3)
    updates, _ = compiled(STACKED_AT_1.update)(grads, STACKED_AT_1.init(grads))
    assert bits(updates) == bits(grads)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e18])
@quick_only("0.001")
def test_the_derivative_through_stacked_layers_is_that_of_separate_leaves(scale):
    grads = stacked_tree(scale=scale)
    weights = stacked_tree(seed=1)

    def derivative_of(tx, grads, weights):
        def loss(grads):
            updates = tx.update(grads, tx.init(grads))[0]
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, updates)))

        return jax.jit(jax.grad(loss))(grads)

    found = derivative_of(STACKED_AT_1, grads, weights)
    chex.assert_tree_all_finite(found)
    alone = layered(thresholds.constant(1.0))
    expected = derivative_of(alone, unstacked(grads), unstacked(weights))
    chex.assert_trees_all_close(unstacked(found), expected, rtol=1e-5, atol=ROUNDING)


@pytest.mark.parametrize("scope", ["global", SCOPES["labels"]])
def test_stacked_without_scope_leaf_raises_and_names_the_remedy(scope):
    for make in (
        functools.partial(ost.clip_by_threshold, thresholds.constant(1.0)),
        ost.clip_by_zscore,
        functools.partial(ost.clip_by_quantile, 0.1),
    ):
        with pytest.raises(ValueError, match="give scope='leaf'") as raised:
            make(scope=scope, stacked=STACKED)
        assert f"scope={scope!r}" in str(raised.value)


def test_a_stacked_scalar_raises_and_is_named():
    tx = layered(thresholds.constant(1.0), True)
    grads = {"a": {"scale": np.float32(1.0)}, "w": np.ones((3, 2), np.float32)}
    with pytest.raises(ValueError, match="'a/scale', a scalar without layers"):
        tx.init(grads)


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
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ost.clip_by_zscore(**{name: value})


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (ost.clip_by_quantile, "q", 0.0),
        (functools.partial(ost.clip_by_quantile, 0.1), "window", 1),
        (functools.partial(ost.clip_by_quantile, 0.1), "scope", "layer"),
        (ost.clip_by_leaf_history, "ratio", 0.0),
        (ost.clip_by_leaf_history, "decay", 1.0),
        (ost.clip_by_leaf_history, "warmup", 0),
        (ost.clip_by_leaf_history, "relearn_after", 0),
    ],
)
def test_a_preset_names_the_argument_that_is_out_of_range(make, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make(**{name: value})
