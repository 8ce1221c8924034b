"""Aggregates of microbatches: any grouping, any order, whatever the empty ones hold."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiers import full

import optax_stability as ost
from optax_stability._moments import _moments

ROUNDING = 1e-6
NOT_A_NUMBER = {"b": np.full(2, np.nan, "f4"), "w": np.full((2, 2), np.nan, "f4")}

merge = jax.jit(_moments.merge)
single = jax.jit(functools.partial(_moments.single, mean_square=True))
stacked = jax.jit(functools.partial(_moments.stacked, mean_square=True))
all_finite = jax.jit(_moments.all_finite)
sizes = jax.jit(_moments.rms)


def make_grads(count, seed=0, level=0.0, spread=1.0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        noise = rng.standard_normal((count, *shape))
        return (level + spread * noise).astype(np.float32)

    return {"b": leaf(2), "w": leaf(2, 2)}


def pick(tree, places):
    return jax.tree.map(lambda leaf: leaf[places], tree)


def reference(grads, values, weights):
    """N, ḡ, loss, deviation and mean_square in float64, over those of weight > 0."""
    kept = np.asarray(weights) > 0
    grads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[kept], grads)
    values = np.asarray(values, np.float64)[kept]
    n = np.asarray(weights, np.float64)[kept]

    def mean(leaf):
        return np.tensordot(n, leaf, 1) / n.sum()

    average = jax.tree.map(mean, grads)
    squared = jax.tree.map(lambda leaf, m: np.square(leaf - m), grads, average)
    return {
        "mean": average,
        "value": mean(values),
        "num_microbatches": np.int32(kept.sum()),
        "weight": n.sum(),
        "deviation": np.array(
            [np.tensordot(n, leaf, 1).sum() for leaf in jax.tree.leaves(squared)]
        ),
        "mean_square": jax.tree.map(lambda leaf: mean(leaf**2), grads),
    }


def summary(aggregate):
    moments = aggregate.moments
    return {
        "mean": aggregate.mean,
        "value": aggregate.value,
        "num_microbatches": moments.num_microbatches,
        "weight": moments.weight,
        "deviation": moments.deviation,
        "mean_square": moments.mean_square,
    }


def check(aggregate, expected, *, largest=1.0, rtol=ROUNDING):
    """Means up to rounding of the largest entry, deviations to the second order."""
    found, expected = summary(aggregate), dict(expected)
    # A rounded mean is off by 6e-8 of the largest entry: a deviation of that size in
    # each of the entries, and none where nothing deviates by 1e-5 of the mean.
    np.testing.assert_allclose(
        found.pop("deviation"),
        expected.pop("deviation"),
        rtol=1e-3,
        atol=1e-10 * largest**2 * max(float(expected["weight"]), 1.0),
    )
    chex.assert_trees_all_close(
        found.pop("mean_square"),
        expected.pop("mean_square"),
        rtol=4 * rtol,
        atol=4 * rtol * largest**2,
    )
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=rtol * largest)


def each(grads, values, weights):
    """Every microbatch as an aggregate of its own."""
    return [
        single(pick(grads, k), np.float32(values[k]), np.float32(weights[k]))
        for k in range(len(weights))
    ]


# --- merging ---------------------------------------------------------------------

ENTRIES = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-10 else 0.0)


@st.composite
def streams(draw):
    """Microbatches, a few of weight 0 that hold NaN."""
    count = draw(st.integers(1, 6))
    some = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])
    weights = draw(st.lists(some, min_size=count, max_size=count))
    entries = draw(st.lists(ENTRIES, min_size=7 * count, max_size=7 * count))
    table = np.array(entries, np.float32).reshape(count, 7)
    table[np.array(weights) == 0] = np.nan
    grads = {"b": table[:, :2], "w": table[:, 2:6].reshape(-1, 2, 2)}
    return grads, table[:, 6], np.array(weights, np.float32)


def merge_at_random(draw, aggregates):
    """Pairs of any two, until one is left."""
    while len(aggregates) > 1:
        one = aggregates.pop(draw(st.integers(0, len(aggregates) - 1)))
        other = aggregates.pop(draw(st.integers(0, len(aggregates) - 1)))
        aggregates.append(merge(one, other))
    return aggregates[0]


QUICK = hypothesis.settings(derandomize=True, max_examples=60, deadline=None)


@QUICK
@hypothesis.given(stream=streams(), data=st.data())
@full
def test_any_order_and_grouping_is_the_mean_of_those_that_count(stream, data):
    grads, values, weights = stream
    merged = merge_at_random(data.draw, each(*stream))
    if not np.any(weights > 0):
        assert float(merged.moments.weight) == 0
        assert int(merged.moments.num_microbatches) == 0
        return
    largest = float(np.max([np.nanmax(np.abs(x)) for x in (*grads.values(), values)]))
    check(merged, reference(*stream), largest=max(largest, 1e-3))


@QUICK
@hypothesis.given(stream=streams(), cut=st.integers(0, 6))
@full
def test_groups_that_are_stacked_merge_like_single_ones(stream, cut):
    grads, values, weights = stream
    if not np.any(weights > 0):
        return
    # Padded to one length with what does not count: one compilation for all.
    parts = []
    for chosen in (np.arange(6) < cut, np.arange(6) >= cut):
        chosen = chosen & (np.arange(6) < len(weights))
        pad = [(0, 6 - len(weights))]
        part = jax.tree.map(
            lambda x, pad=pad: np.pad(x, pad + [(0, 0)] * (x.ndim - 1)), (grads, values)
        )
        parts.append(stacked(*part, np.where(chosen, np.pad(weights, pad), 0)))
    largest = float(np.max([np.nanmax(np.abs(x)) for x in (*grads.values(), values)]))
    check(merge(*parts), reference(*stream), largest=max(largest, 1e-3))


EMPTY = {
    "nothing": lambda: _moments.empty(NOT_A_NUMBER, mean_square=True),
    "single": lambda: single(NOT_A_NUMBER, np.float32(np.nan), np.float32(0)),
    "stacked": lambda: stacked(
        jax.tree.map(lambda x: np.stack([x, x]), NOT_A_NUMBER),
        np.full(2, np.nan, np.float32),
        np.zeros(2, np.float32),
    ),
    "undone": lambda: _moments.if_kept(
        single(NOT_A_NUMBER, np.float32(np.nan), np.float32(3)), np.bool_(False)
    ),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_aggregate_is_neutral_on_either_side(kind):
    empty = EMPTY[kind]()
    assert int(empty.moments.num_microbatches) == float(empty.moments.weight) == 0
    full = stacked(
        make_grads(3), np.arange(3, dtype="f4"), np.array([1.0, 2.0, 4.0], "f4")
    )
    for merged in (merge(full, empty), merge(empty, full)):
        chex.assert_trees_all_equal(summary(merged), summary(full))


@pytest.mark.parametrize("kind", EMPTY)
def test_two_empty_aggregates_are_none(kind):
    merged = merge(_moments.empty(NOT_A_NUMBER, mean_square=True), EMPTY[kind]())
    for leaf in jax.tree.leaves(merged):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_what_is_kept_is_left_as_it_is():
    full = stacked(make_grads(2), np.zeros(2, "f4"), np.ones(2, "f4"))
    kept = _moments.if_kept(full, np.bool_(True))
    chex.assert_trees_all_equal(summary(kept), summary(full))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_stacked_is_the_rule(count):
    weights = np.array([1, 0, 3, 2, 5, 0.5, 0, 1], "f4")[:count]
    grads, values = make_grads(count, level=3.0), np.linspace(-1, 1, count)
    aggregate = stacked(grads, values.astype("f4"), weights)
    check(aggregate, reference(grads, values, weights), largest=4.0)


def test_single_is_the_rule():
    grads = make_grads(1)
    (aggregate,) = each(grads, [2.0], [5.0])
    check(aggregate, reference(grads, [2.0], [5.0]))
    np.testing.assert_array_equal(aggregate.moments.deviation, np.zeros(2))


@pytest.mark.parametrize("level", [1.0, -300.0])
def test_a_small_spread_is_kept_through_many_merges(level):
    grads = make_grads(40, level=level, spread=1e-4 * abs(level))
    values, weights = np.zeros(40), np.full(40, 8.0)
    expected = reference(grads, values, weights)["deviation"]
    aggregates = each(grads, values, weights)
    forwards, halves = aggregates[0], list(aggregates)
    for aggregate in aggregates[1:]:
        forwards = merge(forwards, aggregate)
    while len(halves) > 1:
        joined = [merge(*pair) for pair in zip(halves[::2], halves[1::2], strict=False)]
        halves = joined + (halves[-1:] if len(halves) % 2 else [])
    for merged in (forwards, halves[0]):
        np.testing.assert_allclose(merged.moments.deviation, expected, rtol=1e-3)


def test_merging_large_groups_that_are_far_apart():
    # Nearly all deviation lies between the groups: Nₐ·N_b/N·‖ḡₐ − ḡ_b‖².
    weights = np.array([1, 2, 100, 300], "f4")
    grads = make_grads(4, spread=1e-3)
    grads = jax.tree.map(
        lambda x: x + np.array([5, 5, -3, -3.0]).reshape(-1, *[1] * (x.ndim - 1)), grads
    )
    grads = jax.tree.map(np.float32, grads)
    values = np.zeros(4, "f4")
    parts = [
        stacked(pick(grads, part), values[part], weights[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    expected = reference(grads, values, weights)
    assert np.all(expected["deviation"] > 300)
    for merged in (merge(*parts), merge(*parts[::-1])):
        np.testing.assert_allclose(
            merged.moments.deviation, expected["deviation"], rtol=1e-5
        )


def test_merging_keeps_the_dtypes_and_marks_of_the_first():
    like = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2), jnp.bfloat16)}
    nothing = _moments.empty(like, mean_square=True)
    narrow = _moments.empty(like, mean_square=False, dtype=jnp.bfloat16)
    grads = jax.tree.map(lambda x: x + 1, like)
    part = _moments.single(grads, 0.0, 1.0, mean_square=True)
    merged = merge(nothing, part)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, nothing)
    assert merged.mean["w"].dtype == np.float32
    assert merged.moments.leaves == nothing.moments.leaves
    part = part._replace(moments=part.moments._replace(mean_square=None))
    merged = merge(narrow, part)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, narrow)
    assert merged.mean["b"].dtype == jnp.bfloat16
    assert merged.moments.mean_square is None


def test_widening_leaves_wide_leaves_alone():
    with jax.enable_x64(True):
        tree = {
            n: jnp.ones(1, n) for n in ("bfloat16", "float16", "float32", "float64")
        }
        found = {name: str(x.dtype) for name, x in _moments.widen(tree).items()}
    assert set(found.values()) == {"float32", "float64"}
    assert found["float64"] == "float64"


def test_no_leaves_have_no_deviation():
    part = _moments.single({}, 1.0, 2.0, mean_square=True)
    merged = merge(_moments.empty({}, mean_square=True), part)
    assert merged.moments.deviation.shape == (0,)
    assert float(merged.value) == 1
    assert float(merged.moments.weight) == 2


def test_distances_are_summed_over_the_axes_of_shard_map():
    weights = np.array([1.0, 3.0], "f4")
    grads = {"w": make_grads(2)["w"].reshape(2, 4)}
    parts = each(grads, np.zeros(2), weights)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda x: PartitionSpec(), parts[0])
    row = {"w": PartitionSpec("model")}
    specs = specs._replace(mean=row, moments=specs.moments._replace(mean_square=row))

    def merge_shards(a, b):
        between = _moments.squared_distances(a, b.mean, axis_name="model")
        return _moments.merge(a, b, between)

    sharded = jax.shard_map(
        merge_shards, mesh=mesh, in_specs=(specs, specs), out_specs=specs
    )
    check(jax.jit(sharded)(*parts), reference(grads, np.zeros(2), weights))


def test_deviations_of_shards_are_summed():
    """An axis of ``vmap`` counts as sharding, and compiles faster than a mesh."""
    values, weights = np.zeros(3, "f4"), np.array([1.0, 3.0, 2.0], "f4")
    whole = {"w": make_grads(3)["w"].reshape(3, 4)}

    def deviation_of(shard):
        options = {"mean_square": False, "axis_name": "part"}
        return _moments.stacked(shard, values, weights, **options).moments.deviation

    shards = {"w": whole["w"].reshape(3, 2, 2)}
    found = jax.vmap(deviation_of, in_axes=1, axis_name="part")(shards)
    expected = reference(whole, values, weights)["deviation"]
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-5)


# --- overflow and underflow ------------------------------------------------------


def test_a_distance_beyond_1e19_is_infinite_and_never_nan():
    grads = {"far": np.array([[1e25], [-1e25]], "f4"), "near": np.eye(2, dtype="f4")}
    values, weights = np.zeros(2, "f4"), np.ones(2, "f4")
    for aggregate in (
        stacked(grads, values, weights),
        merge(*each(grads, values, weights)),
        merge(merge(*each(grads, values, weights)), each(grads, values, weights)[0]),
    ):
        assert np.isposinf(aggregate.moments.deviation[0])
        assert 0.5 < float(aggregate.moments.deviation[1]) < 2
        assert np.isfinite(aggregate.moments.mean_square["far"][0])
        assert float(aggregate.moments.mean_square["far"][0]) > 3.4e38
        assert abs(float(aggregate.mean["far"][0])) <= 1e25


def test_entries_up_to_8e37_are_averaged_without_overflow():
    grads = {"w": np.array([[8e37], [-8e37], [8e37], [8e37]], "f4")}
    values, weights = np.zeros(4, "f4"), np.ones(4, "f4")
    merged = functools.reduce(merge, each(grads, values, weights))
    for aggregate in (stacked(grads, values, weights), merged):
        np.testing.assert_allclose(aggregate.mean["w"], 4e37, rtol=ROUNDING)


# --- finite ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("entry", "finite"),
    [(np.nan, False), (np.inf, False), (-np.inf, False), (-0.0, True), (6e4, True)],
)
def test_one_entry_that_is_not_finite_is_found(entry, finite, dtype):
    for place in range(5):
        leaf = np.array([1, -2, 6e4, 0, 3], np.float32)
        leaf[place] = entry
        tree = {"a": np.zeros(0, dtype), "b": np.ones(3, "f4"), "c": leaf.astype(dtype)}
        assert bool(all_finite(tree, np.float32(1))) == finite


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_entry_above_8e37_is_not_finite(dtype, sign):
    for entry, finite in [(8.4e37, True), (8.6e37, False), (3e38, False)]:
        tree = {"w": np.array([sign * entry, 1.0], "f4").astype(dtype)}
        assert bool(all_finite(tree)) == finite


@pytest.mark.parametrize(
    ("value", "finite"),
    [(np.nan, False), (np.inf, False), (-np.inf, False), (3e38, True), (-3e38, True)],
)
def test_the_loss_has_to_be_finite_but_may_be_large(value, finite):
    tree = {"w": np.ones(2, "f4")}
    assert bool(all_finite(tree, np.float32(value))) == finite
    assert bool(all_finite({}, np.float32(value))) == finite


@pytest.mark.parametrize(
    ("weight", "usable"),
    [(1.0, True), (1e-30, True), (8e37, True), (0.0, False), (-1.0, False)]
    + [(weight, False) for weight in (np.nan, np.inf, -np.inf)],
)
def test_which_weights_count(weight, usable):
    assert bool(_moments.usable_weight(np.float32(weight))) == usable


# --- what a mask leaves ----------------------------------------------------------


def make_tree():
    return {
        "body": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
        "head": {"kernel": jnp.ones(3)},
        "scale": jnp.ones(()),
    }


def make_moments(tree, *, mean_square=True):
    """Moments whose entries tell the leaf that they belong to."""
    count = len(jax.tree.leaves(tree))
    squares = jax.tree.unflatten(
        jax.tree.structure(tree),
        [i + jnp.zeros_like(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))],
    )
    nothing = _moments.empty(tree, mean_square=mean_square)
    return nothing.moments._replace(
        deviation=jnp.arange(count, dtype=jnp.float32),
        norm=10 + jnp.arange(count, dtype=jnp.float32),
        mean_square=squares,
    )


def leaf_numbers(moments):
    return [int(np.ravel(leaf)[0]) for leaf in jax.tree.leaves(moments.mean_square)]


def observer(seen):
    """A transformation that notes what it can see of the moments."""

    def update(updates, state, params=None, *, moments, **extra_args):
        del params, extra_args
        seen.append(_moments.visible(moments, updates))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


MASKS = {
    "full": (
        {
            "body": {"bias": True, "kernel": False},
            "head": {"kernel": True},
            "scale": False,
        },
        [0, 2],
    ),
    "prefix": ({"body": False, "head": True, "scale": True}, [2, 3]),
    "other prefix": ({"body": True, "head": False, "scale": False}, [0, 1]),
    "function": (lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree), [1]),
    "all": (True, [0, 1, 2, 3]),
    "none": (False, []),
}


@pytest.mark.parametrize("kind", MASKS)
def test_moments_behind_a_mask_are_those_of_the_leaves_in_front(kind):
    mask, numbers = MASKS[kind]
    tree, seen = make_tree(), []
    tx = optax.masked(observer(seen), mask)
    tx.update(tree, tx.init(tree), tree, moments=make_moments(tree))
    (found,) = seen
    np.testing.assert_array_equal(found.deviation, numbers)
    np.testing.assert_array_equal(found.norm, 10 + np.array(numbers, int))
    assert leaf_numbers(found) == numbers
    names = ost.leaf_names(tree)
    assert ost._core._tree.names_of_marks(found.leaves) == [names[i] for i in numbers]


def test_every_part_of_a_partition_sees_its_own():
    tree, first, second = make_tree(), [], []
    labels = {"body": "a", "head": "b", "scale": "a"}
    tx = optax.partition({"a": observer(first), "b": observer(second)}, labels)
    tx.update(tree, tx.init(tree), tree, moments=make_moments(tree))
    np.testing.assert_array_equal(first[0].deviation, [0, 1, 3])
    np.testing.assert_array_equal(second[0].deviation, [2])
    assert leaf_numbers(first[0]) == [0, 1, 3]
    assert leaf_numbers(second[0]) == [2]


def test_a_mask_behind_a_mask():
    tree, seen = make_tree(), []
    inner = optax.masked(observer(seen), {"body": True, "head": False, "scale": True})
    tx = optax.masked(
        inner, {"body": {"bias": False, "kernel": True}, "head": True} | {"scale": True}
    )
    tx.update(tree, tx.init(tree), tree, moments=make_moments(tree))
    np.testing.assert_array_equal(seen[0].deviation, [1, 3])
    # What was seen can be seen again: the marks that are left name its entries.
    again = _moments.visible(seen[0], seen[0].mean_square)
    chex.assert_trees_all_equal(again, seen[0])


def test_without_a_mask_everything_is_visible():
    tree = make_tree()
    moments = make_moments(tree)
    chex.assert_trees_all_equal(_moments.visible(moments, tree), moments)
    unknown = moments._replace(norm=None)
    assert _moments.visible(unknown, tree).norm is None


@pytest.mark.parametrize(
    "other",
    [
        {"body": jnp.ones(2)},
        [jnp.ones(2)],
        {**make_tree(), "more": jnp.ones(1)},
        {**make_tree(), "scale": {"inner": jnp.ones(())}},
    ],
    ids=["fewer", "list", "more", "deeper"],
)
def test_moments_of_another_tree_are_an_error(other):
    with pytest.raises(ValueError, match="moments belong to another tree"):
        _moments.visible(make_moments(make_tree()), other)


def test_the_moments_of_microbatch_gradients_are_visible_behind_a_mask():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    rows = make_grads(4)["b"]

    def loss(params, x):
        return jnp.mean(x @ params["a"]) + jnp.sum(params["b"])

    fn = ost.microbatch_gradients(loss, 4, mean_square=True)
    _, grads, moments = jax.jit(fn)(params, rows)
    for hidden, place in (("a", 1), ("b", 0)):
        masked = {**grads, hidden: optax.MaskedNode()}
        found = _moments.visible(moments, masked)
        np.testing.assert_array_equal(found.deviation, moments.deviation[place][None])
        np.testing.assert_array_equal(found.norm, moments.norm[place][None])


# --- sizes -----------------------------------------------------------------------


def moments_of(grads):
    """The moments that microbatch_gradients gives, and ḡ."""
    count = len(jax.tree.leaves(grads)[0])
    aggregate = stacked(grads, np.zeros(count, "f4"), np.ones(count, "f4"))
    norm = ost._core._norms.leaf_norms(aggregate.mean)
    return aggregate.moments._replace(norm=norm), aggregate.mean


def test_sizes_are_the_root_mean_square_of_each_entry():
    grads = make_grads(8)
    moments, mean = moments_of(grads)
    expected = jax.tree.map(
        lambda x: np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=0)), grads
    )
    chex.assert_trees_all_close(sizes(moments, mean), expected, rtol=ROUNDING)
    unknown = moments._replace(norm=None)
    chex.assert_trees_all_close(sizes(unknown, mean), expected, rtol=ROUNDING)


@pytest.mark.parametrize("factors", [(0.5, 0.5), (0.1, 1.0), (1e-6, 3.0), (0.0, -2.0)])
def test_what_a_clip_did_to_a_leaf_is_done_to_its_sizes(factors):
    moments, mean = moments_of(make_grads(8))
    factors = dict(zip(mean, map(np.float32, factors), strict=True))
    clipped = jax.tree.map(lambda x, c: x * c, mean, factors)
    expected = jax.tree.map(
        lambda size, c: size * np.abs(c), sizes(moments, mean), factors
    )
    chex.assert_trees_all_close(sizes(moments, clipped), expected, rtol=4e-6)


def test_sizes_do_not_shrink_where_the_norm_is_not_known():
    moments, mean = moments_of(make_grads(8))
    clipped = jax.tree.map(lambda x: x / 100, mean)
    found = sizes(moments._replace(norm=None), clipped)
    chex.assert_trees_all_close(found, sizes(moments, mean), rtol=ROUNDING)


def test_sizes_of_a_leaf_whose_mean_is_0():
    moments, mean = moments_of({"w": np.array([[1.0], [-1.0]], "f4")})
    np.testing.assert_array_equal(mean["w"], [0])
    np.testing.assert_array_equal(sizes(moments, mean)["w"], [1])


@pytest.mark.parametrize("level", [1e-25, 1e-37, 3e-20, 1e-19])
def test_sizes_are_at_least_the_mean_where_squares_underflow(level):
    grads = {"w": np.full((4, 3), -level, "f4")}
    moments, mean = moments_of(grads)
    np.testing.assert_allclose(sizes(moments, mean)["w"], level, rtol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1e-30, 0.0])
@pytest.mark.parametrize("level", [1e25, -1e19, 3e18])
def test_sizes_saturate_and_are_never_nan(level, factor):
    grads = {"w": np.full((4, 2), level, "f4")}
    moments, mean = moments_of(grads)
    found = sizes(moments, jax.tree.map(lambda x: x * np.float32(factor), mean))
    np.testing.assert_allclose(found["w"], abs(level) * factor, rtol=1e-5)


def test_sizes_end_at_the_root_of_the_largest_number():
    # The mean is 0, and says nothing of 1e25.
    moments, mean = moments_of({"w": np.array([[1e25], [-1e25]], "f4")})
    np.testing.assert_allclose(sizes(moments, mean)["w"], 1.8446743e19, rtol=ROUNDING)


def test_sizes_are_float32():
    moments, mean = moments_of({"w": make_grads(4)["w"].astype(jnp.bfloat16)})
    assert sizes(moments, mean)["w"].dtype == np.float32
