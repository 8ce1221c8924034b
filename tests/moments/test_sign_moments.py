"""Statistics of microbatches in the L1 norm: by hand, and in the mean by theory."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from meshes import place
from scipy import special
from tiers import full

import optax_stability as ost

ROUNDING = 1e-5
ROOT = math.sqrt(math.pi / 2)
# A microbatch's gradient of this loss is the weighted mean of its rows.
D = 5


def linear(params, batch):
    """Its gradient is the mean of the rows."""
    return jnp.mean(batch @ params["w"])


PARAMS = {"w": jnp.zeros(D)}


@functools.cache
def compiled(parts, vmap_size, weighted=False, l1=True):
    weight_fn = (lambda rows: jnp.where(rows[0, 0] > 0, 3.0, 1.0)) if weighted else None
    return jax.jit(
        ost.microbatch_gradients(
            linear, parts, vmap_size=vmap_size, weight_fn=weight_fn, l1=l1
        )
    )


def one_by_one(parts, weights):
    """Deviation and agreement in float64, each microbatch against the earlier ones."""
    deviation = agreement = 0.0
    mean, total, count = np.zeros(parts.shape[1]), 0.0, 0
    for part, n in zip(parts.astype(np.float64), weights, strict=True):
        if count:
            spread = ROOT * math.sqrt(n * total / (n + total))
            deviation += spread * np.abs(part - mean).sum()
            agreement += count * ROOT / math.sqrt(n) * (np.sign(part) @ mean)
        mean = (total * mean + n * part) / (total + n)
        total, count = total + n, count + 1
    return deviation, agreement


def together(parts, weights):
    """The same, each microbatch against all others."""
    parts, n = parts.astype(np.float64), np.asarray(weights, np.float64)
    total, count = n.sum(), len(n)
    mean = n @ parts / total
    deviation = agreement = 0.0
    for part, own in zip(parts, n, strict=True):
        spread = ROOT / math.sqrt(1 / own - 1 / total)
        deviation += (count - 1) / count * spread * np.abs(part - mean).sum()
        others = (total * mean - own * part) / (total - own)
        agreement += (count - 1) / 2 * ROOT / math.sqrt(own) * (np.sign(part) @ others)
    return deviation, agreement


REFERENCES = {1: one_by_one, None: together}


@pytest.mark.parametrize("vmap_size", [1, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sums_are_those_of_the_rule(vmap_size, weighted):
    rows = np.random.default_rng(0).standard_normal((8, D)).astype("f4")
    moments = compiled(4, vmap_size, weighted)(PARAMS, rows)[2]
    parts = rows.reshape(2, 4, D)
    weights = np.where(parts[0, :, 0] > 0, 3.0, 1.0) if weighted else [2.0] * 4
    expected = REFERENCES[vmap_size](parts.mean(0), weights)
    chex.assert_trees_all_close(
        [x[0] for x in moments.l1], [np.float32(x) for x in expected], rtol=ROUNDING
    )


@pytest.mark.parametrize("vmap_size", [1, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_microbatch_that_is_left_out_leaves_no_trace(vmap_size, bad):
    rows = np.random.default_rng(0).standard_normal((4, D)).astype("f4")
    expected = REFERENCES[vmap_size](rows[[0, 1, 3]], [1.0] * 3)
    rows[2, 1] = bad
    moments = compiled(4, vmap_size)(PARAMS, rows)[2]
    assert moments.num_microbatches == 3
    chex.assert_trees_all_close(
        [x[0] for x in moments.l1], [np.float32(x) for x in expected], rtol=ROUNDING
    )


@pytest.mark.parametrize("vmap_size", [1, None])
def test_one_microbatch_or_none_says_nothing(vmap_size):
    nothing = [np.zeros(1, np.float32)] * 2
    one = compiled(1, vmap_size)(PARAMS, np.ones((2, D), "f4"))[2]
    chex.assert_trees_all_equal(list(one.l1), nothing)
    none = compiled(2, vmap_size)(PARAMS, np.full((2, D), np.nan, "f4"))[2]
    chex.assert_trees_all_equal(list(none.l1), nothing)


def test_what_is_not_asked_for_is_not_kept_and_changes_nothing():
    rows = np.random.default_rng(0).standard_normal((8, D)).astype("f4")
    for vmap_size in (1, None):
        without = compiled(4, vmap_size, l1=False)(PARAMS, rows)
        having = compiled(4, vmap_size)(PARAMS, rows)
        assert without[2].l1 is None
        chex.assert_trees_all_equal((*having[:2], having[2]._replace(l1=None)), without)


def test_accumulated_across_calls_they_are_those_of_one_call():
    rows = np.random.default_rng(0).standard_normal((4, D)).astype("f4")
    tx = ost.accumulate_moments(optax.identity(), 4, l1=True)
    state = tx.init(PARAMS)
    for _ in range(2):  # The second window begins anew.
        for row in rows:
            state = tx.update({"w": jnp.asarray(row)}, state, PARAMS)[1]
        expected = one_by_one(rows, [1.0] * 4)
        chex.assert_trees_all_close(
            [x[0] for x in state.moments.l1],
            [np.float32(x) for x in expected],
            rtol=ROUNDING,
        )


def test_a_clip_before_the_accumulation_scales_them_as_it_scales_the_gradient():
    rows = np.random.default_rng(0).standard_normal((8, D)).astype("f4")
    _, grads, moments = compiled(4, 1)(PARAMS, rows)
    tx = ost.accumulate_moments(optax.identity(), 2, mean_square=False, l1=True)
    half = jax.tree.map(lambda g: g / 2, grads)
    _, state = tx.update(half, tx.init(PARAMS), PARAMS, moments=moments)
    expected = jax.tree.map(lambda x: x / 2, moments.l1)
    chex.assert_trees_all_close(state.moments.l1, expected, rtol=ROUNDING)


def test_moments_without_them_cannot_be_accumulated_with_them():
    moments = compiled(2, None, l1=False)(PARAMS, np.ones((2, D), "f4"))[2]
    tx = ost.accumulate_moments(optax.identity(), 2, mean_square=False, l1=True)
    with pytest.raises(ValueError, match=r"moments.l1 is None; .* l1=True"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, moments=moments)


@pytest.mark.parametrize("vmap_size", [1, None])
def test_a_complex_entry_is_two_real_ones(vmap_size):
    rows = np.random.default_rng(0).standard_normal((4, 2 * D)).astype("f4")

    def loss(params, batch):
        z = batch[:, :D] - 1j * batch[:, D:]
        return jnp.mean((z @ params).real)

    fn = ost.microbatch_gradients(loss, 4, vmap_size=vmap_size, l1=True)
    moments = jax.jit(fn)(jnp.zeros(D, jnp.complex64), rows)[2]
    expected = REFERENCES[vmap_size](rows, [1.0] * 4)
    chex.assert_trees_all_close(
        [x[0] for x in moments.l1], [np.float32(x) for x in expected], rtol=ROUNDING
    )


@pytest.mark.parametrize("vmap_size", [1, None])
@full
def test_on_a_mesh_they_are_those_of_one_device(vmap_size):
    """Parameters over one axis, the rows of the batch over the other."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = np.random.default_rng(0).standard_normal((16, 8)).astype("f4")
    params = {"w": jnp.zeros(8)}
    fn = jax.jit(ost.microbatch_gradients(linear, 4, vmap_size=vmap_size, l1=True))
    expected = fn(params, rows)[2].l1
    found = fn(place(params, mesh, "model"), place(rows, mesh, "data"))[2].l1
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)


@pytest.mark.parametrize("vmap_size", [1, None])
def test_gradients_in_half_precision_are_summed_in_float32(vmap_size):
    rows = np.random.default_rng(0).standard_normal((4, D)).astype(jnp.bfloat16)
    params = {"w": jnp.zeros(D, jnp.bfloat16)}
    fn = ost.microbatch_gradients(linear, 4, vmap_size=vmap_size, l1=True)
    moments = jax.jit(fn)(params, rows)[2]
    expected = REFERENCES[vmap_size](rows.astype("f4"), [1.0] * 4)
    assert moments.l1.deviation.dtype == np.float32
    chex.assert_trees_all_close(
        [x[0] for x in moments.l1], [np.float32(x) for x in expected], rtol=ROUNDING
    )


# --- their means, for Gaussian gradients ------------------------------------------

SIGMA = np.array([0.5, 1.0, 2.0, 4.0, 0.0])
TRUE = np.array([0.1, -2.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize("vmap_size", [1, 2, None])
@pytest.mark.parametrize("weighted", [False, True])
@full
def test_their_means_are_those_of_the_theory(vmap_size, weighted):
    """Of 20,000 batches; the sign is that of 1 or 3 examples, or of a group of two."""
    rng, trials = np.random.default_rng(0), 20_000
    weights = np.array([1.0, 3.0, 1.0, 3.0]) if weighted else np.full(4, 2.0)
    noise = SIGMA * rng.standard_normal((trials, 4, D)) / np.sqrt(weights)[:, None]
    rows = (TRUE + noise).astype("f4")

    def weigh(microbatch):
        return microbatch["weight"][0]

    fn = ost.microbatch_gradients(
        lambda params, batch: linear(params, batch["rows"]),
        4,
        vmap_size=vmap_size,
        weight_fn=weigh,
        l1=True,
    )
    shared = jnp.asarray(weights, jnp.float32)
    run = jax.jit(jax.vmap(lambda x: fn(PARAMS, {"rows": x, "weight": shared})[2].l1))
    deviation, agreement = (np.asarray(x)[:, 0] for x in run(rows))

    def agreeing(n):
        with np.errstate(divide="ignore"):
            inside = special.erf(np.abs(TRUE) * np.sqrt(n / 2) / SIGMA)
        return ROOT / math.sqrt(n) * np.sum(np.abs(TRUE) * np.nan_to_num(inside))

    # How many pairs have the sign of each microbatch, and of the second group of two.
    pairs = {1: [0.0, 1.0, 2.0, 3.0], 2: [0.5] * 4, None: [1.5] * 4}[vmap_size]
    expected = sum(c * agreeing(n) for c, n in zip(pairs, weights, strict=True))
    if vmap_size == 2:
        expected += 4 * agreeing(weights[:2].sum())
    for values, true in ((deviation, 3 * SIGMA.sum()), (agreement, expected)):
        assert abs(values.mean() - true) < 4 * values.std() / math.sqrt(trials)
