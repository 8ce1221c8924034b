"""Microbatches: the rule against float64, and what must not change the result."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec, reshard
from meshes import collectives, place
from tiers import full, quick_only

import optax_stability as ost

# A handful of float32 roundings.
ROUNDING = 1e-6
# Second order in the rounding of the mean, if the spread is 1e-4 of it: measured 1e-4.
SPREAD_ROUNDING = 1e-3

PARAMS = {
    "b": np.array([0.5, -1.0, 2.0], np.float32),
    "w": np.linspace(-1, 1, 6).astype(np.float32).reshape(3, 2),
}


# --- a loss whose gradients are known ------------------------------------------------


def linear(params, batch):
    """Its gradient is the mean of the rows; ``extra`` shows in the loss alone."""
    products = jax.tree.map(
        lambda p, rows: jnp.sum(p[None] * rows, axis=tuple(range(1, rows.ndim))),
        params,
        batch["rows"],
    )
    return jnp.mean(sum(jax.tree.leaves(products)) + batch["extra"])


def tokens(microbatch):
    return jnp.sum(microbatch["tokens"])


def make_batch(rows=12, *, seed=0, level=0.0, spread=1.0, weights=None):
    """Rows of random numbers: with one to a microbatch, they are the gradients."""
    rng = np.random.default_rng(seed)

    def around_level(like):
        noise = rng.standard_normal((rows, *like.shape))
        return (level + spread * noise).astype(np.float32)

    return {
        "rows": jax.tree.map(around_level, PARAMS),
        "extra": np.linspace(-1, 1, rows).astype(np.float32),
        "tokens": np.ones(rows, np.float32)
        if weights is None
        else np.asarray(weights, np.float32),
    }


@functools.cache
def compiled(num_microbatches, vmap_size=None, *, loss=linear, **options):
    fn = ost.microbatch_gradients(
        loss, num_microbatches, vmap_size=vmap_size, **options
    )
    return jax.jit(fn)


def microbatches(batch, num_microbatches):
    """The documented ones: rows k, k + K and so on."""
    return [
        jax.tree.map(lambda leaf, k=k: leaf[k::num_microbatches], batch)
        for k in range(num_microbatches)
    ]


def loss_and_gradient(part):
    """Of the linear loss, in float64."""
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    grads = jax.tree.map(lambda rows: rows.mean(0), part["rows"])
    products = jax.tree.map(lambda p, g: np.sum(p * g), PARAMS, grads)
    return sum(jax.tree.leaves(products)) + part["extra"].mean(), grads


def reference(batch, num_microbatches, keep=None):
    """N, loss, ḡ, deviation and mean_square as in the docstring, in float64."""
    parts = microbatches(batch, num_microbatches)
    if keep is not None:
        parts = [part for part, kept in zip(parts, keep, strict=True) if kept]
    losses, grads = zip(*map(loss_and_gradient, parts), strict=True)
    n = np.array([np.sum(part["tokens"], dtype=np.float64) for part in parts])

    def mean(*values):
        return np.average(values, axis=0, weights=n)

    average = jax.tree.map(mean, *grads)
    distances = [
        [np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)]
        for pair in ((g, average) for g in grads)
    ]
    return {
        "num_microbatches": len(parts),
        "weight": n.sum(),
        "loss": mean(*losses),
        "grads": average,
        "deviation": n @ np.array(distances),
        "mean_square": jax.tree.map(lambda *gs: mean(*(g**2 for g in gs)), *grads),
        "norm": np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(average)]),
    }


def summary(result):
    """What a call has returned, under the names of the reference."""
    value, grads, moments = result
    named = moments._asdict()
    named.pop("leaves")
    assert named.pop("l1") is None
    return {"loss": value, "grads": grads, **named}


def check(result, expected, *, rtol=ROUNDING, spread_rtol=None):
    found, expected = summary(result), dict(expected)
    if spread_rtol is not None:
        np.testing.assert_allclose(
            found.pop("deviation"), expected.pop("deviation"), rtol=spread_rtol
        )
    # Relative to the numbers that were averaged: a mean may cancel to nearly 0.
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=rtol, strict=False)


def divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


# --- the rule --------------------------------------------------------------------


def every_vmap_size(vmap_size):
    together = None if vmap_size == 12 else vmap_size
    return compiled(12, together, mean_square=True, weight_fn=tokens)


@pytest.mark.parametrize("vmap_size", divisors(12))
@quick_only("1", "4", "12")
def test_the_rule_for_every_vmap_size(vmap_size):
    fn = every_vmap_size(vmap_size)
    equal, unequal = make_batch(24), make_batch(24, weights=np.arange(24) % 7 + 0.5)
    check(fn(PARAMS, equal), reference(equal, 12))
    check(fn(PARAMS, unequal), reference(unequal, 12))


@pytest.mark.parametrize("num_microbatches", [1, 3, 24])
def test_the_rule_for_every_number_of_microbatches(num_microbatches):
    batch = make_batch(24)
    fn = compiled(num_microbatches, mean_square=True)
    # By default the weight is the number of rows, and a row is one token here.
    check(fn(PARAMS, batch), reference(batch, num_microbatches))


def test_the_types_of_what_is_returned():
    value, grads, moments = every_vmap_size(3)(PARAMS, make_batch(24))
    assert value.dtype == np.float32
    assert value.shape == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(moments.mean_square, PARAMS)
    assert moments.num_microbatches.dtype == np.int32
    assert moments.num_microbatches.shape == moments.weight.shape == ()
    assert moments.weight.dtype == moments.deviation.dtype == np.float32
    assert moments.deviation.shape == moments.norm.shape == (2,)
    assert ost.leaf_names(PARAMS) == ["b", "w"]
    assert not any(value.weak_type for value in jax.tree.leaves((value, moments)))


def test_mean_square_is_kept_on_demand_only():
    assert compiled(2)(PARAMS, make_batch(2))[2].mean_square is None


def test_one_microbatch_is_value_and_grad_bit_for_bit():
    batch = make_batch(8)
    expected = jax.jit(jax.value_and_grad(linear))(PARAMS, batch)
    value, grads, moments = compiled(1)(PARAMS, batch)
    chex.assert_trees_all_equal((value, grads), expected)
    np.testing.assert_array_equal(moments.deviation, 0)
    assert int(moments.num_microbatches) == 1
    assert float(moments.weight) == 8


def test_it_works_outside_jit():
    batch = make_batch(4)
    fn = ost.microbatch_gradients(linear, 4, vmap_size=2, mean_square=True)
    check(fn(PARAMS, batch), reference(batch, 4))


# --- the whole batch -------------------------------------------------------------


def make_mlp(dtype=np.float32, width=8):
    rng = np.random.default_rng(3)

    def kernel(*shape):
        return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), dtype)

    params = {
        "in": kernel(5, width),
        "out": kernel(width, 1),
        "bias": np.ones(1, dtype),
    }
    batch = {
        "x": rng.standard_normal((64, 5)).astype(dtype),
        "y": rng.standard_normal((64, 1)).astype(dtype),
    }
    return params, batch


def mlp_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jnp.mean((hidden @ params["out"] + params["bias"][None] - batch["y"]) ** 2)


whole_gradient = jax.jit(jax.value_and_grad(mlp_loss))


@pytest.mark.parametrize(
    ("x64", "vmap_size", "tolerance"),
    # Shares of the weight are float32: one after the other they are 1/3, 1/5 and such.
    [(False, 1, 1e-6), (False, 16, 1e-6), (True, 1, 1e-7), (True, 16, 1e-14)],
)
@quick_only("False-1-1e-06")
def test_loss_and_gradient_are_those_of_the_whole_batch(x64, vmap_size, tolerance):
    with jax.enable_x64(x64):
        params, batch = make_mlp(np.float64 if x64 else np.float32)
        loss, grads = whole_gradient(params, batch)
        fn = compiled(16, vmap_size, loss=mlp_loss, mean_square=True)
        found_loss, found, moments = fn(params, batch)
        chex.assert_trees_all_close(found, grads, rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_equal_dtypes(found, params)
        # What describes the whole tree has the widest of the dtypes.
        np.testing.assert_allclose(found_loss, loss, rtol=ROUNDING)
        wide = np.float64 if x64 else np.float32
        assert found_loss.dtype == moments.deviation.dtype == wide


@full
def test_float64_moments_are_those_of_float64_gradients():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, PARAMS)
        batch = jax.tree.map(np.float64, make_batch(8))
        # A spread that float32 would not see beside the level.
        batch["rows"] = jax.tree.map(lambda x: 1 + 1e-9 * x, batch["rows"])
        for vmap_size in (1, 4):
            fn = ost.microbatch_gradients(
                linear, 8, vmap_size=vmap_size, mean_square=True
            )
            _, grads, moments = jax.jit(fn)(params, batch)
            expected = reference(batch, 8)
            chex.assert_trees_all_close(grads, expected["grads"], rtol=1e-14)
            chex.assert_trees_all_close(
                moments.mean_square, expected["mean_square"], rtol=1e-14
            )
            np.testing.assert_allclose(
                moments.deviation, expected["deviation"], rtol=1e-5
            )


def dot(params, rows):
    return jnp.mean(rows @ params)


ROWS = {
    # Gradients that are mostly noise, as those of one sequence are.
    "noise": lambda rng, shape: rng.standard_normal(shape),
    # Gradients that agree to three digits: every partial mean is rounded the most.
    "agreeing": lambda rng, shape: 1 + 1e-3 * rng.standard_normal(shape),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("num_microbatches", "vmap_size"), [(8, 1), (8, 2), (8, 8), (64, 1), (64, 64)]
)
@quick_only("8-2-noise", "8-8-agreeing")
def test_rounding_of_the_mean_in_float32(kind, num_microbatches, vmap_size):
    rng = np.random.default_rng(7)
    rows = ROWS[kind](rng, (num_microbatches, 2048)).astype(np.float32)
    fn = compiled(num_microbatches, vmap_size, loss=dot)
    _, grads, _ = fn(np.ones(2048, np.float32), rows)
    error = np.abs(np.asarray(grads, np.float64) - rows.astype(np.float64).mean(0))
    # One after the other, K rounded partial means that agree take √K times as much.
    is_long_sum = kind == "agreeing" and num_microbatches == 64 and vmap_size == 1
    bound = 2.0**-20 if is_long_sum else 2.0**-22
    assert np.max(error / np.abs(rows).max(0)) <= bound


@pytest.mark.parametrize("vmap_size", [1, 4, 12])
def test_the_order_of_microbatches_does_not_matter(vmap_size):
    batch = make_batch(24, weights=np.arange(24) + 1)
    fn = every_vmap_size(vmap_size)
    expected = summary(fn(PARAMS, batch))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(12)
        rows = np.arange(24).reshape(2, 12)[:, order].ravel()
        found = fn(PARAMS, jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch))
        chex.assert_trees_all_close(
            summary(found), expected, rtol=ROUNDING, atol=ROUNDING
        )


@pytest.mark.parametrize("vmap_size", [1, 4, 12])
@pytest.mark.parametrize("level", [1.0, -1e4, 1e10, 1e-10])
def test_a_spread_of_a_ten_thousandth_of_the_mean_is_measured(level, vmap_size):
    batch = make_batch(24, level=level, spread=1e-4 * abs(level))
    fn = every_vmap_size(vmap_size)
    found = fn(PARAMS, batch)[2].deviation
    expected = reference(batch, 12)["deviation"]
    np.testing.assert_allclose(found, expected, rtol=SPREAD_ROUNDING)
    # What it is measured against: E[m²] − E[m]² in float32 is of no use here.
    grads = batch["rows"]["b"].reshape(2, 12, 3).mean(0)
    naive = 24 * np.sum(np.mean(grads**2, 0) - np.mean(grads, 0) ** 2)
    assert abs(naive - expected[0]) > 100 * SPREAD_ROUNDING * expected[0]


@pytest.mark.parametrize("vmap_size", [1, 2, 4])
@quick_only("4")
def test_equal_microbatches_have_no_deviation(vmap_size):
    batch = make_batch(1, level=3.0)
    batch = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), batch)
    _, grads, moments = compiled(4, vmap_size, mean_square=True, weight_fn=tokens)(
        PARAMS, batch
    )
    np.testing.assert_array_equal(moments.deviation, 0)
    chex.assert_trees_all_equal(grads, jax.tree.map(lambda x: x[0], batch["rows"]))


# --- aux -------------------------------------------------------------------------


def with_aux(params, batch):
    aux = {"rows": batch["id"], "loss": (jnp.sum(params), None), "nothing": None}
    return jnp.mean(batch["id"].astype(params.dtype) * params), aux


@pytest.mark.parametrize("vmap_size", divisors(6))
@quick_only("1", "6")
def test_aux_is_stacked_in_the_order_of_the_microbatches(vmap_size):
    ids = np.arange(24)
    fn = compiled(6, vmap_size, loss=with_aux, has_aux=True)
    (loss, aux), grads, moments = fn(jnp.float32(2), {"id": ids})
    # Row k of the stack is microbatch k, and has the rows k, k + K, k + 2K …
    np.testing.assert_array_equal(aux["rows"], ids.reshape(4, 6).T)
    assert aux["rows"].dtype == ids.astype(np.int32).dtype
    np.testing.assert_array_equal(aux["loss"][0], np.full(6, 2, np.float32))
    assert aux["loss"][1] is None
    assert aux["nothing"] is None
    assert float(loss) == 2 * ids.mean()
    assert float(grads) == ids.mean()
    assert int(moments.num_microbatches) == 6


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_aux_may_be_nothing(vmap_size):
    fn = compiled(4, vmap_size, loss=lambda p, x: (dot(p, x), None), has_aux=True)
    (loss, aux), _, _ = fn(jnp.ones(2), jnp.ones((4, 2)))
    assert aux is None
    assert float(loss) == 2


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_aux_of_a_rejected_microbatch_is_handed_on(vmap_size):
    fn = compiled(4, vmap_size, loss=lambda p, x: (dot(p, x), x[0, 0]), has_aux=True)
    rows = np.array([[1], [np.nan], [3], [4]], np.float32)
    (loss, aux), _, _ = fn(jnp.ones(1), rows)
    np.testing.assert_array_equal(aux, rows[:, 0])
    np.testing.assert_allclose(loss, 8 / 3, rtol=ROUNDING)


# --- weights ---------------------------------------------------------------------


def masked_mean(params, batch):
    errors = (batch["x"] @ params - batch["y"]) ** 2
    return jnp.sum(errors * batch["mask"]) / jnp.sum(batch["mask"])


@jax.jit
def mean_of_means(params, parts):
    return jnp.mean(jnp.stack([masked_mean(params, part) for part in parts]))


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("4")
def test_token_weights_give_the_mean_over_all_tokens(vmap_size):
    rng = np.random.default_rng(5)
    mask = rng.random((8, 16)) < np.linspace(0.1, 1, 8)[:, None]
    batch = {
        "x": rng.standard_normal((8, 16, 3)).astype(np.float32),
        "y": rng.standard_normal((8, 16)).astype(np.float32),
        "mask": mask.astype(np.float32),
    }
    params = np.array([1.0, -1.0, 0.5], np.float32)
    weigh = compiled(
        4, vmap_size, loss=masked_mean, weight_fn=lambda part: part["mask"].sum()
    )
    loss, grads, moments = weigh(params, batch)
    expected = jax.jit(jax.value_and_grad(masked_mean))(params, batch)
    chex.assert_trees_all_close((loss, grads), expected, rtol=2e-6)
    assert float(moments.weight) == mask.sum()
    # The mean of the means is another number: the weights do matter here.
    unweighted = mean_of_means(params, microbatches(batch, 4))
    assert abs(unweighted / float(loss) - 1) > 1e-3


def test_integer_weights_count():
    fn = compiled(3, 1, weight_fn=lambda part: part["tokens"].astype(int).sum())
    batch = make_batch(3, weights=[1, 2, 5])
    _, grads, moments = fn(PARAMS, batch)
    chex.assert_trees_all_close(grads, reference(batch, 3)["grads"], rtol=ROUNDING)
    assert float(moments.weight) == 8


@pytest.mark.parametrize("vmap_size", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, -0.0, -2.0, np.nan, np.inf, -np.inf])
def test_a_microbatch_of_no_usable_weight_is_left_out(weight, vmap_size):
    fn = compiled(4, vmap_size, mean_square=True, weight_fn=tokens)
    for index in range(4):
        batch = make_batch(4, weights=[1, 2, 3, 4])
        batch["tokens"][index] = weight
        check(fn(PARAMS, batch), reference(batch, 4, np.arange(4) != index))


def let_through(vmap_size):
    options = {"mean_square": True, "weight_fn": tokens, "reject_nonfinite": False}
    return compiled(4, vmap_size, **options)


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_no_weight_is_used_even_if_what_is_not_finite_is_kept(vmap_size):
    fn = let_through(vmap_size)
    batch = make_batch(4, weights=[1, 0, np.nan, -1])
    _, grads, moments = fn(PARAMS, batch)
    expected = reference(batch, 4, [True, False, False, False])["grads"]
    chex.assert_trees_all_close(grads, expected, rtol=ROUNDING)
    assert int(moments.num_microbatches) == 1


# --- what is not finite ----------------------------------------------------------


def spoil(batch, place, kind):
    rows, extra = batch["rows"], batch["extra"]
    if kind == "loss":  # The gradient stays finite.
        extra[place] = np.nan
    elif kind == "infinite loss":
        extra[place] = -np.inf
    else:
        rows["w"][place, 1, 1] = {
            "nan": np.nan,
            "inf": np.inf,
            "-inf": -np.inf,
            "huge": -9e37,
        }[kind]


BAD = ["nan", "inf", "-inf", "huge", "loss", "infinite loss"]


@pytest.mark.parametrize("vmap_size", [1, 2, 4])
@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_finite_changes_nothing_but_the_counts(kind, vmap_size):
    fn = compiled(4, vmap_size, mean_square=True, weight_fn=tokens)
    for index in range(4):
        batch = make_batch(4, seed=index, weights=[1, 2, 3, 4])
        expected = reference(batch, 4, np.arange(4) != index)
        spoil(batch, index, kind)
        result = fn(PARAMS, batch)
        assert int(result[2].num_microbatches) == 3
        assert float(result[2].weight) == 10 - (index + 1)
        check(result, expected)


@pytest.mark.parametrize("vmap_size", [1, 2, 4])
def test_any_number_of_microbatches_may_be_left_out(vmap_size):
    fn = compiled(4, vmap_size, mean_square=True, weight_fn=tokens)
    for pattern in range(1, 16):
        keep = [bool(pattern >> place & 1) for place in range(4)]
        batch = make_batch(4, seed=pattern, weights=[4, 3, 2, 1])
        expected = reference(batch, 4, keep)
        for index in np.flatnonzero(np.logical_not(keep)):
            spoil(batch, index, BAD[index])
        check(fn(PARAMS, batch), expected)


@pytest.mark.parametrize("kind", ["nan", "inf", "loss"])
@pytest.mark.parametrize("vmap_size", [1, 2, 4])
def test_if_none_is_kept_the_loss_is_nan_and_the_gradient_0(vmap_size, kind):
    batch = make_batch(4)
    for index in range(4):
        spoil(batch, index, kind)
    fn = compiled(4, vmap_size, mean_square=True, weight_fn=tokens)
    loss, grads, moments = fn(PARAMS, batch)
    assert np.isnan(loss)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    chex.assert_trees_all_equal(grads, zeros)
    chex.assert_trees_all_equal(moments.mean_square, zeros)
    assert int(moments.num_microbatches) == float(moments.weight) == 0
    np.testing.assert_array_equal(moments.deviation, 0)
    np.testing.assert_array_equal(moments.norm, 0)


def test_a_step_without_gradient_is_skipped():
    tx = ost.skip_spikes(optax.sgd(0.1))
    batch = make_batch(4)
    for index in range(4):
        spoil(batch, index, "nan")
    loss, grads, _ = compiled(4, 2, mean_square=True, weight_fn=tokens)(PARAMS, batch)
    updates, state = jax.jit(tx.update)(
        grads, jax.jit(tx.init)(PARAMS), PARAMS, value=loss
    )
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, PARAMS))
    assert int(ost.metrics(state)["skip/total"]) == 1


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_what_is_not_finite_can_be_let_through(vmap_size):
    fn = let_through(vmap_size)
    batch = make_batch(4)
    expected = reference(batch, 4)
    spoil(batch, 2, "nan")
    loss, grads, moments = fn(PARAMS, batch)
    assert np.isnan(loss)
    np.testing.assert_array_equal(
        np.isnan(grads["w"]), [[False, False], [False, True], [False, False]]
    )
    np.testing.assert_allclose(grads["b"], expected["grads"]["b"], rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(moments.deviation), [False, True])
    np.testing.assert_array_equal(
        np.isnan(moments.mean_square["w"]), np.isnan(grads["w"])
    )
    assert int(moments.num_microbatches) == float(moments.weight) == 4


@pytest.mark.parametrize("vmap_size", [1, 2])
@pytest.mark.parametrize(("entry", "kept"), [(8e37, 2), (-8e37, 2), (9e37, 1)])
def test_where_not_finite_begins(entry, kept, vmap_size):
    rows = np.array([[1.0, 2.0], [0.0, entry]], np.float32)
    params = np.array([1.0, 1e-30], np.float32)
    loss, grads, moments = compiled(2, vmap_size, loss=dot)(params, rows)
    assert int(moments.num_microbatches) == kept
    np.testing.assert_allclose(grads, rows[:kept].mean(0), rtol=ROUNDING)
    assert np.isfinite(loss)


# --- dtypes ----------------------------------------------------------------------


def half_sum(values, dtype):
    """What adding up in a narrow dtype gives."""
    total = np.zeros((), dtype)
    for value in values.astype(dtype):
        total = (total + value).astype(dtype)
    return float(total)


@pytest.mark.parametrize(
    ("dtype", "vmap_size"),
    [(jnp.bfloat16, 1), (jnp.bfloat16, 1024), (jnp.float16, 4)],
)
def test_narrow_gradients_are_summed_in_float32(dtype, vmap_size):
    # Running means in bfloat16 stall: 1/k of the distance is less than half a spacing.
    values = np.repeat([0.0, 1.0], 512)
    expected = {"mean": 0.5, "deviation": 1024 * 0.25, "square": 0.5}
    if dtype == jnp.bfloat16:
        assert half_sum(np.ones(1024), dtype) == 256
    fn = compiled(1024, vmap_size, loss=dot, mean_square=True)
    rows = values.astype(dtype)[:, None]
    loss, grads, moments = fn(jnp.ones(1, dtype), rows)
    assert grads.dtype == dtype
    assert loss.dtype == moments.mean_square.dtype == np.float32
    assert float(grads[0]) == expected["mean"]
    np.testing.assert_allclose(loss, expected["mean"], rtol=1e-5)
    np.testing.assert_allclose(moments.mean_square[0], expected["square"], rtol=1e-5)
    np.testing.assert_allclose(moments.deviation[0], expected["deviation"], rtol=1e-5)


@pytest.mark.parametrize("vmap_size", [1, 3])
def test_the_mean_of_narrow_gradients_is_rounded_once(vmap_size):
    # In float16 or bfloat16 these add up to the wrong neighbour.
    rows = np.array([[1.0], [1.0078125], [1.015625]]).astype(jnp.bfloat16)
    _, grads, moments = compiled(3, vmap_size, loss=dot)(
        jnp.ones(1, jnp.bfloat16), rows
    )
    assert float(grads[0]) == 1.0078125
    np.testing.assert_allclose(moments.deviation, 2 * 0.0078125**2, rtol=1e-5)


@pytest.mark.parametrize("vmap_size", [1, 2])
@quick_only("2")
def test_every_leaf_keeps_its_own_dtype(vmap_size):
    dtypes = {"b": jnp.float32, "w": jnp.bfloat16}
    params = jax.tree.map(lambda p, dtype: p.astype(dtype), PARAMS, dtypes)
    batch = make_batch(4)
    batch["rows"] = jax.tree.map(
        lambda x, dtype: x.astype(dtype), batch["rows"], dtypes
    )
    result = compiled(4, vmap_size, mean_square=True)(params, batch)
    chex.assert_trees_all_equal_dtypes(result[1], params)
    wide = jax.tree.leaves(result[2].mean_square)
    assert {leaf.dtype for leaf in wide} == {np.dtype("float32")}
    # The largest entry is about 2, half a spacing of bfloat16 there 2⁻⁸.
    expected = reference(batch, 4)["grads"]
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(np.float32), result[1]),
        jax.tree.map(np.float32, expected),
        atol=2.0**-8,
    )
    np.testing.assert_allclose(result[1]["b"], expected["b"], rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "vmap_size"), [(jnp.bfloat16, 2), (jnp.float16, 1), (jnp.float16, 4)]
)
def test_narrow_overflow_is_left_out(dtype, vmap_size):
    rows = np.array([[1.0], [np.inf], [3.0], [np.nan]]).astype(dtype)
    fn = compiled(4, vmap_size, loss=dot, mean_square=True)
    _, grads, moments = fn(jnp.ones(1, dtype), rows)
    assert int(moments.num_microbatches) == 2
    assert float(grads[0]) == 2
    assert grads.dtype == dtype


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_mean_of_float16_does_not_overflow(vmap_size):
    rows = np.full((4, 1), 6e4, np.float16)
    fn = compiled(4, vmap_size, loss=dot, mean_square=True)
    loss, grads, moments = fn(jnp.ones(1, np.float16), rows)
    assert float(grads[0]) == float(loss) == 6e4
    np.testing.assert_allclose(moments.mean_square, 3.6e9, rtol=ROUNDING)


# --- a loss scale ----------------------------------------------------------------


def scaled(num_microbatches, vmap_size, loss):
    """With the loss scale as its last argument."""
    fn = ost.microbatch_gradients(loss, num_microbatches, vmap_size=vmap_size)
    return jax.jit(lambda params, batch, scale: fn(params, batch, loss_scale=scale))


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("4")
def test_a_power_of_two_as_loss_scale_changes_no_bit(vmap_size):
    params, batch = make_mlp()
    plain = summary(compiled(4, vmap_size, loss=mlp_loss)(params, batch))
    fn = scaled(4, vmap_size, mlp_loss)
    for scale in (2.0**15, 2.0**-20, 2.0**100):
        chex.assert_trees_all_equal(summary(fn(params, batch, scale)), plain)
    other = summary(fn(params, batch, 3e4))
    chex.assert_trees_all_equal(other["loss"], plain["loss"])
    chex.assert_trees_all_close(other, plain, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("vmap_size", [1, 2])
def test_the_gradient_of_float16_is_unscaled_in_float32(vmap_size):
    def loss(params, rows):
        return 2.0**-15 * dot(params, rows).astype(jnp.float32)

    # Gradients half a spacing and one spacing of float16 above 2⁻¹⁵: divided in
    # float16, the first of them would be 2⁻¹⁵ and so would the mean.
    rows = np.array([[1 + 2.0**-10], [1 + 2.0**-9]], np.float16)
    fn = scaled(2, vmap_size, loss)
    _, grads, moments = fn(np.ones(1, np.float16), rows, 2.0**15)
    assert grads.dtype == np.float16
    assert float(grads[0]) == 2.0**-15 + 2.0**-24
    np.testing.assert_allclose(moments.deviation, [2 * (2.0**-26) ** 2], rtol=1e-6)


@pytest.mark.parametrize("vmap_size", [1, 2])
def test_no_loss_scale_turns_a_gradient_into_0(vmap_size):
    # The reciprocals of the largest are below the smallest normal number.
    rows = np.array([[1.0], [3.0]], np.float32)
    fn = scaled(2, vmap_size, dot)
    for scale in (2.0**-126, 1e-40, 2.0**126, 2.0**127, np.finfo(np.float32).max):
        _, grads, moments = fn(np.ones(1, np.float32), rows, np.float32(scale))
        assert float(grads[0]) == int(moments.num_microbatches) == 2
    loss, grads, moments = fn(np.ones(1, np.float32), rows, np.float32(np.nan))
    assert np.isnan(loss)
    assert float(grads[0]) == int(moments.num_microbatches) == 0


@pytest.mark.parametrize(("dtype", "kept"), [(np.float16, 0), (np.float32, 2)])
def test_a_mean_in_float16_ends_at_a_scale_of_65504(dtype, kept):
    rows = np.full((4, 1), 0.25, np.float16)
    fn = scaled(2, 2, lambda params, rows: jnp.mean((rows @ params).astype(dtype)))
    moments = fn(np.ones(1, np.float16), rows, 65536.0)[2]
    assert int(moments.num_microbatches) == kept


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, "2", True], ids=repr)
def test_what_is_no_loss_scale_is_named(scale):
    fn = ost.microbatch_gradients(dot, 2)
    with pytest.raises((TypeError, ValueError), match="loss_scale"):
        fn(np.ones(3, np.float32), np.ones((2, 3), np.float32), loss_scale=scale)


# --- the batch -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        ({"x": np.ones((6, 2)), "y": {"z": np.ones(7)}}, ["'y/z'", "(7,)"]),
        ({"x": np.ones((5, 2))}, ["'x'", "(5, 2)"]),
        ({"x": np.ones((6, 2)), "scale": 3.0}, ["'scale'", "()"]),
        (np.ones((2, 6)), ["'params'", "(2, 6)"]),
    ],
    ids=["nested", "flat", "scalar", "bare"],
)
def test_the_error_names_the_array_that_cannot_be_cut(batch, parts):
    fn = ost.microbatch_gradients(lambda p, b: p, 3)
    with pytest.raises(ValueError, match="num_microbatches=3") as caught:
        fn(jnp.ones(()), batch)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("batch", [{}, [], None, {"x": None}], ids=repr)
def test_a_batch_without_arrays_is_an_error(batch):
    fn = ost.microbatch_gradients(lambda p, b: p, 3)
    with pytest.raises(ValueError, match="holds no array"):
        fn(jnp.ones(()), batch)


def test_a_batch_without_rows_is_refused():
    fn = compiled(2, 1, loss=dot)
    with pytest.raises(ValueError, match="no examples"):
        fn(jnp.ones(3), jnp.ones((0, 3)))


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("1")
def test_integer_inputs_and_arrays_without_a_second_axis(vmap_size):
    def cross_entropy(logits, batch):
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits)[batch["token"]], batch["label"][:, None], axis=1
        )
        return -jnp.mean(picked)

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 7)).astype(np.float32)
    batch = {"token": rng.integers(7, size=16), "label": rng.integers(7, size=16)}
    expected = jax.jit(jax.value_and_grad(cross_entropy))(logits, batch)
    fn = ost.microbatch_gradients(cross_entropy, 4, vmap_size=vmap_size)
    chex.assert_trees_all_close(
        jax.jit(fn)(logits, batch)[:2], expected, rtol=ROUNDING, atol=ROUNDING
    )


def dropout_loss(params, batch):
    assert batch["key"].shape[0] == 1
    mask = jax.random.bernoulli(batch["key"][0], 0.5, batch["x"].shape)
    return jnp.mean(jnp.where(mask, batch["x"], 0) @ params), mask


one_microbatch = jax.jit(jax.value_and_grad(dropout_loss, has_aux=True))


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("4")
def test_every_microbatch_has_a_key_of_its_own(vmap_size):
    batch = {
        "x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32),
        "key": jax.random.split(jax.random.key(1), 4),
    }
    params = np.ones(16, np.float32)
    fn = compiled(4, vmap_size, loss=dropout_loss, has_aux=True)
    (loss, masks), grads, moments = fn(params, batch)
    by_hand = [one_microbatch(params, part) for part in microbatches(batch, 4)]
    np.testing.assert_array_equal(masks, [mask for (_, mask), _ in by_hand])
    assert len({mask.tobytes() for mask in np.asarray(masks)}) == 4
    expected = np.mean([grad for _, grad in by_hand], axis=0)
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=ROUNDING)
    np.testing.assert_allclose(
        loss, np.mean([value for (value, _), _ in by_hand]), rtol=1e-5
    )
    # Rows are counted, keys are not.
    assert float(moments.weight) == 8


def rows_of(num_microbatches, vmap_size, **options):
    fn = compiled(num_microbatches, vmap_size, loss=with_aux, has_aux=True, **options)
    (_, aux), _, _ = fn(jnp.float32(1), {"id": np.arange(24)})
    return np.asarray(aux["rows"])


@full
def test_rows_are_neighbours_if_devices_have_microbatches_of_their_own():
    blocks = np.arange(24).reshape(12, 2)
    # Device d of 4 has blocks 3d, 3d + 1 and 3d + 2, and takes them one by one.
    evaluated = np.arange(12).reshape(4, 3).T.ravel()
    with jax.set_mesh(make_mesh(AxisType.Auto)):
        np.testing.assert_array_equal(
            rows_of(12, 4, spmd_axis_name="data"), blocks[evaluated]
        )
        np.testing.assert_array_equal(rows_of(12, 12, spmd_axis_name="data"), blocks)
        np.testing.assert_array_equal(rows_of(12, 4), np.arange(24).reshape(2, 12).T)


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_microbatches", "vmap_size"])
@pytest.mark.parametrize("size", [0, -1, 2.5, 2.0, "2", True, jnp.int32(2)], ids=repr)
def test_what_is_no_size_is_named(name, size):
    arguments = {"num_microbatches": 4, name: size}
    with pytest.raises((TypeError, ValueError), match=name):
        ost.microbatch_gradients(linear, **arguments)


@pytest.mark.parametrize(("parts", "together"), [(4, 3), (4, 8), (6, 4)])
def test_vmap_size_divides_the_number_of_microbatches(parts, together):
    with pytest.raises(ValueError, match=rf"vmap_size={together}.*\n?.*={parts}"):
        ost.microbatch_gradients(linear, parts, vmap_size=together)


# --- inside and around transformations -------------------------------------------


@pytest.mark.parametrize("vmap_size", [1, 16])
@quick_only("1")
def test_checkpoint_inside_the_loss_changes_nothing(vmap_size):
    params, batch = make_mlp()
    plain = compiled(16, vmap_size, loss=mlp_loss, mean_square=True)(params, batch)
    saved = compiled(16, vmap_size, loss=jax.checkpoint(mlp_loss), mean_square=True)(
        params, batch
    )
    chex.assert_trees_all_close(
        summary(saved), summary(plain), rtol=ROUNDING, atol=ROUNDING
    )


def train_step(params, batch, vmap_size=2):
    fn = ost.microbatch_gradients(linear_squared, 4, vmap_size=vmap_size)
    loss, grads, moments = fn(params, batch)
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    return params, (loss, moments.deviation)


def linear_squared(params, rows):
    return jnp.mean(jnp.square(rows @ params["w"] - 1))


def make_steps(steps=3):
    rng = np.random.default_rng(2)
    batches = rng.standard_normal((steps, 8, 3)).astype(np.float32)
    return {"w": np.ones(3, np.float32)}, batches


@pytest.mark.parametrize("vmap_size", [1, 4])
@quick_only("1")
def test_a_scan_over_steps_is_the_steps_one_by_one(vmap_size):
    params, batches = make_steps()
    step = functools.partial(train_step, vmap_size=vmap_size)
    expected, told = params, []
    for batch in batches:
        expected, info = jax.jit(step)(expected, batch)
        told.append(info)
    found, infos = jax.jit(lambda p, b: lax.scan(step, p, b))(params, batches)
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *told)
    chex.assert_trees_all_close(infos, stacked, rtol=1e-5)


@pytest.mark.parametrize(
    ("vmap_size", "in_axes"), [(1, (0, None)), (2, (None, 0)), (2, (0, 0))]
)
@quick_only("1-in_axes0")
def test_vmap_around_is_each_on_its_own(in_axes, vmap_size):
    params, batches = make_steps()
    seeds = {"w": np.arange(9, dtype=np.float32).reshape(3, 3)}
    step = functools.partial(train_step, vmap_size=vmap_size)
    one, other = (
        seeds if in_axes[0] == 0 else params,
        batches if in_axes[1] == 0 else batches[0],
    )
    # One of them loses a microbatch; the others must not notice.
    if in_axes[1] == 0:
        other = other.copy()
        other[1, 2] = np.nan
    found = jax.jit(jax.vmap(step, in_axes))(one, other)
    for i in range(3):
        alone = jax.jit(step)(
            jax.tree.map(lambda p, i=i: p[i], one) if in_axes[0] == 0 else one,
            other[i] if in_axes[1] == 0 else other,
        )
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], found), alone, rtol=1e-5, atol=ROUNDING
        )


def test_parameters_can_be_donated():
    params, batches = make_steps()
    expected = jax.jit(train_step)(params, batches[0])
    params = jax.tree.map(jnp.array, params)
    found = jax.jit(train_step, donate_argnums=0)(params, batches[0])
    chex.assert_trees_all_equal(found, expected)
    assert params["w"].is_deleted()


@pytest.mark.parametrize("vmap_size", [1, 4])
def test_the_loss_is_traced_once_for_repeated_calls(vmap_size):
    traces = []

    def loss(params, rows):
        traces.append(rows.shape)
        return dot(params, rows)

    fn = jax.jit(ost.microbatch_gradients(loss, 4, vmap_size=vmap_size))
    for seed in range(3):
        rows = np.random.default_rng(seed).standard_normal((8, 3)).astype(np.float32)
        fn(np.ones(3, np.float32), rows)
    assert traces == [(2, 3)]


@pytest.mark.parametrize("vmap_size", [1, 2])
def test_no_parameters_have_no_gradient(vmap_size):
    fn = compiled(2, vmap_size, loss=lambda p, x: jnp.mean(x), mean_square=True)
    rows = np.array([1.0, np.nan], np.float32)
    loss, grads, moments = fn({}, rows)
    assert float(loss) == float(moments.weight) == 1
    assert grads == moments.mean_square == {}
    assert moments.deviation.shape == moments.norm.shape == (0,)


@pytest.mark.parametrize("vmap_size", [1, 2])
def test_parameters_that_the_loss_does_not_use_have_gradient_0(vmap_size):
    params = {"used": np.ones(2, np.float32), "unused": np.ones((0, 3), np.float32)}
    fn = compiled(2, vmap_size, loss=lambda p, x: dot(p["used"], x))
    _, grads, moments = fn(params, np.ones((2, 2), np.float32))
    chex.assert_trees_all_equal(grads, params)
    np.testing.assert_array_equal(moments.deviation, 0)
    _, grads, _ = fn({**params, "unused": np.ones(3)}, np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(grads["unused"], 0)


# --- meshes ----------------------------------------------------------------------

# K, vmap_size and spmd_axis_name on four devices, for 64 rows.
SPLITS = [
    (AxisType.Auto, 4, 1, None),
    (AxisType.Explicit, 4, 1, None),
    (AxisType.Explicit, 16, 4, None),
    (AxisType.Explicit, 4, 4, "data"),
    (AxisType.Auto, 16, 8, "data"),
    (AxisType.Explicit, 16, 8, "data"),
]


def make_mesh(axis_type):
    return jax.make_mesh((4,), ("data",), axis_types=(axis_type,))


def reduced_entries(program):
    """How many numbers are added up across devices."""
    sent = collectives(program)
    assert {operation for operation, _ in sent} <= {"all-reduce"}
    return sum(math.prod(shape) for _, shapes in sent for shape in shapes)


def neighbours(rows, parts):
    """Where rows must stand for k, k + K and so on to be neighbours."""
    return np.arange(rows).reshape(parts, -1).T.ravel()


@pytest.mark.parametrize(("axis_type", "parts", "vmap_size", "spmd"), SPLITS)
@quick_only("AxisType.Explicit-4-1-None")
def test_sharded_rows_stay_where_they_are(axis_type, parts, vmap_size, spmd):
    params, batch = make_mlp()
    fn = ost.microbatch_gradients(
        mlp_loss, parts, vmap_size=vmap_size, spmd_axis_name=spmd, mean_square=True
    )
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        arguments = place(params, mesh), place(batch, mesh, "data")
        program = jax.jit(fn).lower(*arguments).compile()
        result = program(*arguments)
    assert {operation for operation, _ in collectives(program)} == {"all-reduce"}
    if spmd is not None:
        order = neighbours(64, parts)
        batch = jax.tree.map(lambda leaf: leaf[order], batch)
    unsharded = compiled(parts, parts, loss=mlp_loss, mean_square=True)(params, batch)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=ROUNDING)
    close(summary(result), summary(unsharded))
    close(result[:2], whole_gradient(params, batch))


@pytest.mark.parametrize(
    ("axis_type", "parts", "spmd"),
    [
        (AxisType.Auto, 8, None),
        (AxisType.Auto, 8, "data"),
        (AxisType.Explicit, 8, "data"),
        # The second eight are in the same loop.
        (AxisType.Auto, 16, "data"),
    ],
)
def test_microbatches_of_their_own_are_added_up_once(axis_type, parts, spmd):
    mesh, params = make_mesh(axis_type), np.ones(512, np.float32)
    fn = ost.microbatch_gradients(dot, parts, vmap_size=8, spmd_axis_name=spmd)
    with jax.set_mesh(mesh):
        rows = place(np.ones((64, 512), np.float32), mesh, "data")
        program = jax.jit(fn).lower(place(params, mesh), rows).compile()
    gradients = 8 if spmd is None else 1
    # Beside the gradients a few scalars: losses, weights, counts and deviations.
    assert 0 <= reduced_entries(program) - gradients * params.size <= 16


def test_a_batch_sharded_along_a_second_axis_is_not_gathered():
    rows = np.random.default_rng(0).standard_normal((16, 8, 3)).astype(np.float32)
    params = np.ones(3, np.float32)
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
    fn = ost.microbatch_gradients(dot, 4, vmap_size=2)
    with jax.set_mesh(mesh):
        arguments = place(params, mesh), place(rows, mesh, "data", "seq")
        program = jax.jit(fn).lower(*arguments).compile()
        _, grads, _ = program(*arguments)
    assert {operation for operation, _ in collectives(program)} == {"all-reduce"}
    np.testing.assert_allclose(grads, rows.mean((0, 1)), atol=ROUNDING)


@pytest.mark.parametrize(("parts", "vmap_size"), [(4, 1), (8, 4)])
@quick_only("4-1")
def test_sharded_parameters_on_an_explicit_mesh(parts, vmap_size):
    params, batch = make_mlp()
    params.pop("bias")  # Its one entry cannot be sharded.

    def loss(params, batch):
        # Gathered to be used, as fully sharded parameters are.
        whole = jax.tree.map(lambda p: reshard(p, PartitionSpec()), params)
        return mlp_loss({**whole, "bias": np.zeros(1, np.float32)}, batch)

    plain = {**params, "bias": np.zeros(1, np.float32)}
    expected = whole_gradient(plain, batch)
    mesh = make_mesh(AxisType.Explicit)
    fn = ost.microbatch_gradients(loss, parts, vmap_size=vmap_size, mean_square=True)
    with jax.set_mesh(mesh):
        sharded = {
            "in": place(params["in"], mesh, None, "data"),
            "out": place(params["out"], mesh, "data"),
        }
        arguments = sharded, place(batch, mesh, "data")
        program = jax.jit(fn).lower(*arguments).compile()
        value, grads, moments = program(*arguments)
    np.testing.assert_allclose(value, expected[0], rtol=ROUNDING)
    for name, leaf in sharded.items():
        for found in (grads[name], moments.mean_square[name]):
            assert found.sharding.is_equivalent_to(leaf.sharding, 2)
        np.testing.assert_allclose(
            grads[name], expected[1][name], rtol=1e-5, atol=ROUNDING
        )
    # Parameters are gathered, rows are not.
    sent = collectives(program)
    assert {operation for operation, _ in sent} == {"all-gather", "all-reduce"}
    gathered = [shape for name, shapes in sent for shape in shapes if "gather" in name]
    assert set(gathered) == {leaf.shape for leaf in params.values()}


@pytest.mark.parametrize(("parts", "vmap_size", "spmd"), [(4, 1, None), (8, 4, "data")])
@quick_only("4-1-None")
def test_sharded_parameters_on_an_auto_mesh(parts, vmap_size, spmd):
    params, batch = make_mlp()
    expected = whole_gradient(params, batch)
    mesh = make_mesh(AxisType.Auto)
    specs = {"in": (None, "data"), "out": ("data",), "bias": ()}
    with jax.set_mesh(mesh):
        sharded = {name: place(params[name], mesh, *specs[name]) for name in params}
        wanted = jax.tree.map(lambda leaf: leaf.sharding, sharded)
        fn = ost.microbatch_gradients(
            mlp_loss, parts, vmap_size=vmap_size, spmd_axis_name=spmd
        )
        fn = jax.jit(fn, out_shardings=(None, wanted, None))
        value, grads, _ = fn(sharded, place(batch, mesh, "data"))
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5, atol=ROUNDING)


def test_a_sharded_batch_loses_one_microbatch_only():
    rows = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    rows[5, 1] = np.nan
    params = np.ones(3, np.float32)
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        fn = compiled(8, 4, loss=dot, spmd_axis_name="data")
        _, grads, moments = fn(place(params, mesh), place(rows, mesh, "data"))
    assert int(moments.num_microbatches) == 7
    kept = np.delete(rows, [4, 5], axis=0)  # Neighbours.
    np.testing.assert_allclose(grads, kept.mean(0), rtol=1e-5, atol=ROUNDING)


# --- cost ------------------------------------------------------------------------

DEPTH, WIDTH, LENGTH = 2, 64, 128


def transformer_loss(params, x):
    """Attention and a nonlinear layer, ``lax.scan`` over depth."""

    def layer(hidden, kernels):
        scores = hidden @ hidden.swapaxes(-1, -2) / WIDTH**0.5
        mixed = jax.nn.softmax(scores) @ hidden
        return hidden + jnp.tanh(mixed @ kernels["in"]) @ kernels["out"], None

    return jnp.mean((lax.scan(layer, x, params)[0] - 1) ** 2)


def accumulate_by_hand(params, x):
    """What one would write: Σgₖ/K, and nothing besides."""
    parts = x.reshape(-1, 8, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        new = jax.value_and_grad(transformer_loss)(params, part)
        return jax.tree.map(lambda a, b: a + b / 8, total, new), None

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return lax.scan(add, nothing, parts)[0]


@full
def test_one_by_one_costs_what_accumulation_by_hand_costs():
    kernel = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), np.float32)
    params = {"in": kernel, "out": kernel}
    x = jax.ShapeDtypeStruct((16, LENGTH, WIDTH), np.float32)
    fn = ost.microbatch_gradients(transformer_loss, 8, vmap_size=1)
    # A loss scale is multiplied into whatever reads a part's gradient.
    scaled = functools.partial(fn, loss_scale=np.float32(2.0**15))
    programs = [
        jax.jit(f).lower(params, x).compile() for f in (accumulate_by_hand, fn, scaled)
    ]
    gradient = sum(4 * math.prod(leaf.shape) for leaf in params.values())
    temp = [p.memory_analysis().temp_size_in_bytes for p in programs]
    assert max(temp[1:]) - temp[0] < gradient / 8
    # Results: loss and gradient, and a few scalars.
    results = [p.memory_analysis().output_size_in_bytes for p in programs]
    assert max(results[1:]) - results[0] < 1024
    flops = [p.cost_analysis()["flops"] for p in programs]
    assert abs(flops[1] / flops[0] - 1) < 0.02
    # One for the distance from the mean, one for the new mean.
    assert flops[2] - flops[1] < 2.1 * gradient / 4


@full
def test_memory_grows_with_how_many_are_evaluated_together():
    """Only vmap_size gradients at a time: a quarter of all is well below all."""
    params = jax.ShapeDtypeStruct((64, 512), np.float32)
    x = jax.ShapeDtypeStruct((16, 64), np.float32)

    def temp(vmap_size):
        fn = ost.microbatch_gradients(
            lambda p, x: jnp.mean(jnp.tanh(x @ p)), 8, vmap_size=vmap_size
        )
        program = jax.jit(fn).lower(params, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    gradient = 4 * 64 * 512
    # In the scan: those evaluated together and one accumulator, which is the result.
    assert temp(1) < 2.5 * gradient
    assert temp(2) < 6 * gradient
