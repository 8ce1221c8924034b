"""The noise scale against closed forms, with gradients of every source."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from tiers import full, quick_only

import optax_stability as ost
from optax_stability._moments import _moments
from optax_stability._noise import _estimation

# Some dozen roundings of float32.
ROUNDING = 1e-5
# Standard errors that chance may be off; the keys are fixed.
SIGMAS = 4.0


def moments_of(grads, weights=None):
    """What a step hands on, of microbatch gradients along axis 0, and their mean."""
    leaves = jax.tree.leaves(grads)
    weights = jnp.ones(leaves[0].shape[0]) if weights is None else weights
    losses = jnp.zeros(leaves[0].shape[0])
    whole = _moments.stacked(grads, losses, jnp.asarray(weights), mean_square=False)
    norm = ost._core._norms.leaf_norms(whole.mean)
    return whole.moments._replace(norm=norm), whole.mean


def observe(grads, weights=None):
    """S and G² of one step, summed over the leaves."""
    moments, _ = moments_of(grads, weights)
    observed = _estimation._observe(moments, jnp.square(moments.norm))
    return jnp.sum(observed.trace), jnp.sum(observed.grad_sq)


def run(tx, steps, params=None, **extra):
    """The state after microbatch gradients of several steps, [steps, K, …]."""
    first = jax.tree.map(lambda leaf: leaf[0, 0], steps)
    params = jax.tree.map(jnp.ones_like, first) if params is None else params

    def step(state, grads):
        moments, mean = moments_of(grads)
        return tx.update(mean, state, params, moments=moments, **extra)[1], None

    return jax.jit(lambda s, g: jax.lax.scan(step, s, g))(tx.init(params), steps)[0]


# --- S and G² of one step, against the theory of Gaussian noise ----------------------

TRIALS, K, EACH = 20_000, 8, 4
BATCH = K * EACH
# Trace 10, of the squares 20.5; a mean gradient with ‖G‖² = 1.
VARIANCES = np.array([4.0, 2.0, 2.0, 1.0, 0.5, 0.5])
MEAN = np.array([0.8, 0.0, 0.6, 0.0, 0.0, 0.0])


@functools.cache
def gaussian_trials():
    """S and G² of many steps, [2, TRIALS], of microbatches of four examples each."""
    noise = jax.random.normal(jax.random.key(0), (TRIALS, K, VARIANCES.size))
    grads = MEAN[None, None] + noise * np.sqrt(VARIANCES / EACH)[None, None]
    weights = np.full(K, EACH, np.float32)
    both = jax.jit(jax.vmap(lambda g: observe(g, weights)))(grads)
    return np.array(both, np.float64)


def test_s_and_g2_have_no_bias():
    trace, grad_sq = gaussian_trials()
    for found, true in ((trace, VARIANCES.sum()), (grad_sq, 1.0)):
        error = found.std() / math.sqrt(TRIALS)
        assert abs(found.mean() - true) < SIGMAS * error


def test_variances_and_covariance_are_those_of_theory():
    trace, grad_sq = gaussian_trials()
    squares, along = np.square(VARIANCES).sum(), (MEAN**2 * VARIANCES).sum()
    expected = {
        "trace": 2 * squares / (K - 1),
        "grad_sq": 4 * along / BATCH + 2 * squares * K / ((K - 1) * BATCH**2),
        "both": -2 * squares / ((K - 1) * BATCH),
    }
    covariance = np.cov(trace, grad_sq)
    found = {
        "trace": covariance[0, 0],
        "grad_sq": covariance[1, 1],
        "both": covariance[0, 1],
    }
    # Quadratic forms of Gaussians have an excess kurtosis of at most 12; by Cauchy and
    # Schwarz that bounds the covariance too.
    error = math.sqrt((2 + 12) / TRIALS)
    scale = {
        "trace": expected["trace"],
        "grad_sq": expected["grad_sq"],
        "both": math.sqrt(expected["trace"] * expected["grad_sq"]),
    }
    for key, true in expected.items():
        assert abs(found[key] - true) < SIGMAS * error * scale[key], key


@functools.cache
def isotropic_trials(d, b_simple):
    """S and G² for noise that is alike in all directions, ‖G‖² = 1."""
    noise = jax.random.normal(jax.random.key(1), (TRIALS, K, d))
    mean = np.zeros(d)
    mean[0] = 1.0
    grads = mean + noise * math.sqrt(b_simple / d / EACH)
    weights = np.full(K, EACH, np.float32)
    return np.array(jax.jit(jax.vmap(lambda g: observe(g, weights)))(grads), float)


@pytest.mark.parametrize(("d", "b_simple"), [(10, 40.0), (50, 400.0)])
@full
def test_how_often_g2_is_below_zero_and_its_quantiles(d, b_simple):
    """F = B‖ḡ‖²/S·… is noncentral F; one step's ratio is B/(F − 1)."""
    trace, grad_sq = isotropic_trials(d, b_simple)
    law = stats.ncf(d, d * (K - 1), BATCH * d / b_simple)
    negative = law.cdf(1.0)
    assert 0.05 < negative < 0.5
    error = math.sqrt(negative * (1 - negative) / TRIALS)
    assert abs(np.mean(grad_sq < 0) - negative) < SIGMAS * error
    # Ratios above 0 fall as F grows.
    ratio = BATCH / (law.ppf([0.6, 0.75, 0.9]) - 1)
    shares = [np.mean((trace / grad_sq > r) & (grad_sq > 0)) for r in ratio]
    expected = np.array([0.6, 0.75, 0.9]) - negative
    np.testing.assert_allclose(shares, expected, atol=SIGMAS * 0.5 / TRIALS**0.5)


@full
def test_microbatches_of_unequal_weight():
    sizes = np.array([1, 3, 7, 2, 11])
    noise = jax.random.normal(jax.random.key(2), (TRIALS, len(sizes), VARIANCES.size))
    grads = MEAN + noise * np.sqrt(VARIANCES) / np.sqrt(sizes)[:, None]
    trace, grad_sq = (
        np.array(each, float)
        for each in jax.jit(jax.vmap(lambda g: observe(g, sizes.astype("f4"))))(grads)
    )
    for found, true in ((trace, VARIANCES.sum()), (grad_sq, 1.0)):
        assert abs(found.mean() - true) < SIGMAS * found.std() / math.sqrt(TRIALS)
    # With the mean size for each, as everyone has it, the trace is twice too large.
    alike, _ = jax.jit(jax.vmap(lambda g: observe(g, np.full(5, 4.8, "f4"))))(grads)
    assert alike.mean() > 1.9 * VARIANCES.sum()


# --- real gradients ------------------------------------------------------------------

D, SIGMA = 5, 3.0
DELTA = np.array([0.5, -0.5, 0.5, 0.5, 0.0], np.float32)


def regression_loss(params, batch):
    residual = batch["x"] @ params["w"] - batch["y"]
    return jnp.mean(jnp.square(residual)) / 2


def draw_regression(key, rows):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (rows, D))
    return {"x": x, "y": SIGMA * jax.random.normal(keys[1], (rows,))}


@functools.cache
def regression(num_microbatches, rows, steps, decay=1 - 1e-6):
    """The estimate after steps that leave the parameters where they are."""
    gradients = ost.microbatch_gradients(regression_loss, num_microbatches)
    tx, params = ost.estimate_noise_scale(decay=decay), {"w": jnp.asarray(DELTA)}

    def step(state, key):
        _, grads, moments = gradients(params, draw_regression(key, rows))
        return tx.update(grads, state, params, moments=moments)[1], None

    keys = jax.random.split(jax.random.key(3), steps)
    state = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(tx.init(params), keys)[0]
    return ost.noise_scale(state)


def test_linear_regression_has_the_noise_scale_of_the_closed_form():
    """E xxᵀδ = δ; the trace is (d+1)‖δ‖² + dσ² for normal x and noise."""
    true = (D + 1) + D * SIGMA**2 / np.square(DELTA).sum()
    found = regression(8, 32, 4000)
    assert found.valid
    error = (found.high - found.low) / (2 * 1.96)
    assert error < 0.03 * true
    assert abs(found.b_simple - true) < SIGMAS * error
    assert found.low < true < found.high
    np.testing.assert_allclose(found.grad_sq, np.square(DELTA).sum(), rtol=0.1)
    assert round(found.steps) in range(3980, 4001)


@full
def test_the_size_of_the_batch_does_not_matter():
    small, large = regression(4, 16, 4000), regression(8, 64, 1000)
    both = [(each.high - each.low) / (2 * 1.96) for each in (small, large)]
    assert abs(small.b_simple - large.b_simple) < SIGMAS * math.hypot(*both)


def draw_tree(steps, seed=0, scale=1.0):
    """Microbatch gradients of two leaves with noise of their own, [steps, K, …]."""
    rng = np.random.default_rng(seed)
    quiet = 1 + 0.5 * rng.standard_normal((steps, K, 3))
    loud = 1 + 4.0 * rng.standard_normal((steps, K, 2, 4))
    return jax.tree.map(lambda x: np.float32(scale * x), {"loud": loud, "quiet": quiet})


@full
def test_the_whole_is_pooled_and_no_mean_of_the_leaves():
    found = ost.noise_scale(run(ost.estimate_noise_scale(decay=0.999), draw_tree(2000)))
    # One example per microbatch: the trace is that of the noise drawn.
    expected = {"loud": (8 * 16, 8.0), "quiet": (3 * 0.25, 3.0)}
    for name, (trace, grad_sq) in expected.items():
        leaf = found.per_leaf[name]
        assert leaf.valid
        np.testing.assert_allclose(leaf.trace, trace, rtol=0.03)
        np.testing.assert_allclose(leaf.grad_sq, grad_sq, rtol=0.15)
        assert leaf.low < trace / grad_sq < leaf.high
    pooled = (128 + 0.75) / (8 + 3)
    assert found.low < pooled < found.high
    mean = np.mean([each.b_simple for each in found.per_leaf.values()])
    assert not found.low < mean < found.high


@full
def test_labels_make_streams_of_their_own():
    steps = draw_tree(50)
    steps["other"] = steps["loud"][:, :, 0] / 2
    by_label = ost.estimate_noise_scale(
        scope=lambda tree: {name: "o" in name for name in tree}
    )
    found = ost.noise_scale(run(by_label, steps))
    assert set(found.per_leaf) == {"False", "True"}
    alone = {name: steps[name] for name in ("loud", "other")}
    expected = ost.noise_scale(run(ost.estimate_noise_scale(scope="global"), alone))
    assert expected.per_leaf == {}
    for key in ("b_simple", "low", "high", "trace", "grad_sq", "noise_to_weight"):
        found_one = getattr(found.per_leaf["True"], key)
        np.testing.assert_allclose(found_one, getattr(expected, key), rtol=ROUNDING)
    # In the metrics every leaf has the figure of its label.
    reported = ost.metrics(run(by_label, steps))["noise_scale/trace/per_leaf"]
    traces = [found.per_leaf[name].trace for name in ("True", "True", "False")]
    np.testing.assert_array_equal(reported, np.float32(traces))


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
@quick_only("1048576.0")
def test_a_loss_times_a_power_of_two_changes_no_bit(factor):
    expected = ost.metrics(run(ost.estimate_noise_scale(), draw_tree(40)))
    scaled = ost.metrics(run(ost.estimate_noise_scale(), draw_tree(40, scale=factor)))
    for key in ("b_simple", "low", "high", "valid", "b_simple/per_leaf"):
        key = f"noise_scale/{key}"
        np.testing.assert_array_equal(scaled[key], expected[key], err_msg=key)


@pytest.mark.parametrize("factor", [3.7e-12, 1e15])
@quick_only("3.7e-12")
def test_a_loss_times_a_constant_changes_nothing(factor):
    expected = ost.metrics(run(ost.estimate_noise_scale(), draw_tree(40)))
    scaled = ost.metrics(run(ost.estimate_noise_scale(), draw_tree(40, scale=factor)))
    for key in ("b_simple", "low", "high"):
        key = f"noise_scale/{key}"
        np.testing.assert_allclose(scaled[key], expected[key], rtol=1e-4)


def test_noise_of_a_ten_thousandth_of_the_gradient_is_seen_in_float32():
    rng, d = np.random.default_rng(0), 1000
    grads = 1 + 1e-4 * rng.standard_normal((200, K, d)).astype("f4")
    found = ost.noise_scale(run(ost.estimate_noise_scale(decay=0.999), grads))
    # Of χ² with 200·(K−1)·d degrees of freedom, and roundings of 6e-8 beside 1e-4.
    np.testing.assert_allclose(found.trace, 1e-8 * d, rtol=0.01)
    np.testing.assert_allclose(found.b_simple, 1e-8, rtol=0.01)


@full
def test_bfloat16_gradients_add_no_more_than_their_rounding():
    rng, d = np.random.default_rng(0), 1000
    grads = 1.5 + 0.1 * rng.standard_normal((200, K, d)).astype("f4")
    tx = ost.estimate_noise_scale(decay=0.999)
    exact = ost.noise_scale(run(tx, grads))
    rounded = ost.noise_scale(run(tx, jnp.asarray(grads, jnp.bfloat16)))
    more = (rounded.trace - exact.trace) / exact.grad_sq
    # Half a spacing at most, 2⁻⁹ relative: on average a third of its square.
    assert 0 < more < 2.0**-18
    np.testing.assert_allclose(rounded.grad_sq, exact.grad_sq, rtol=2.0**-9)


# --- averages over steps -------------------------------------------------------------


def synthetic(trace, grad_sq, k=4, weight=8.0, d=1):
    """Moments of a step that say just this."""
    norm = np.sqrt(grad_sq + trace / weight)
    return ost.Moments(
        num_microbatches=jnp.int32(k),
        weight=jnp.float32(weight),
        deviation=jnp.full((d,), trace * (k - 1), jnp.float32),
        mean_square=None,
        norm=jnp.full((d,), norm, jnp.float32),
    )


def feed(tx, steps, params=None):
    """The state after steps whose moments are given."""
    params = {"w": jnp.ones(())} if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    for moments in steps:
        _, state = update(params, state, params, moments=moments)
    return state


def test_a_falling_gradient_makes_the_average_lag_by_the_closed_form_and_no_reading():
    fall, steps = math.exp(-1 / 300), 1200
    stream = [synthetic(1.0, fall**t) for t in range(steps)]
    state = feed(ost.estimate_noise_scale(), stream)
    true = fall ** -(steps - 1)
    # Σ(decay/fall)ˢ over Σdecayˢ: how much larger the mean is than the last.
    mean = (1 - 0.99) / (1 - 0.99 / fall)
    found = state.averages.trace[0] / state.averages.grad_sq[0]
    np.testing.assert_allclose(found / true, 1 / mean, rtol=2e-3)
    # What is reported is of now: a third behind would be the average.
    found = ost.noise_scale(state)
    np.testing.assert_allclose(found.b_simple / true, 1, atol=0.01)
    assert found.low < true < found.high


def test_a_gradient_that_falls_in_the_noise_is_followed():
    """As at the start of a run: a level of 30 that ends after 40 steps."""
    rng = np.random.default_rng(0)
    level = np.where(np.arange(150) < 40, 30.0, 1.0)
    observed = [synthetic(8.0, g) for g in level * rng.uniform(0.5, 1.5, 150)]
    state = feed(ost.estimate_noise_scale(), observed)
    found = ost.noise_scale(state)
    assert found.low < 8 < found.high
    assert state.averages.trace[0] / state.averages.grad_sq[0] < 3


def test_a_half_life_holds_when_the_batch_changes():
    values = np.random.default_rng(0).uniform(0.5, 2.0, 60)
    tx = ost.estimate_noise_scale(half_life=100.0)
    whole = feed(tx, [synthetic(s, 1.0, weight=32.0) for s in values])
    halves = feed(tx, [synthetic(s, 1.0, weight=16.0) for s in np.repeat(values, 2)])
    # What was seen a half-life ago weighs half.
    found = [state.drift.mean_trace[0] for state in (whole, halves)]
    np.testing.assert_allclose(found[1], found[0], rtol=ROUNDING)
    ages = 32.0 * np.arange(60)[::-1]
    expected = np.average(values, weights=0.5 ** (ages / 100))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


def test_one_microbatch_says_nothing():
    steps = [synthetic(1.0, 1.0, k=1)] * 5 + [synthetic(1.0, 1.0, k=0)] * 2
    tx = ost.estimate_noise_scale()
    state = feed(tx, steps)
    found = ost.noise_scale(state)
    assert not found.valid
    assert (found.low, found.high, found.steps) == (0.0, np.inf, 0.0)
    chex.assert_trees_all_equal(state.averages, feed(tx, []).averages)
    assert np.isnan([found.trace, found.grad_sq, found.noise_to_weight]).all()
    # And takes nothing away.
    known = [synthetic(s, 1.0) for s in (1.0, 2.0, 1.5, 1.2)]
    mixed = [step for pair in zip(known, steps, strict=False) for step in pair]
    chex.assert_trees_all_equal(feed(tx, mixed).averages, feed(tx, known).averages)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_leaf_that_is_not_known_is_left_out(bad):
    steps = [synthetic(s, 1.0, d=2) for s in (1.0, 2.0, 1.5, 1.2)]
    spoilt = [m._replace(deviation=m.deviation.at[0].set(bad)) for m in steps]
    params = {"a": jnp.ones(3), "b": jnp.ones(())}
    found = ost.noise_scale(feed(ost.estimate_noise_scale(), spoilt, params))
    alone = ost.noise_scale(feed(ost.estimate_noise_scale(), steps, params))
    assert not found.per_leaf["a"].valid
    for key in ("b_simple", "low", "high", "noise_to_weight"):
        both = (getattr(each.per_leaf["b"], key) for each in (found, alone))
        np.testing.assert_allclose(*both, rtol=ROUNDING)
    if np.isnan(bad):
        assert found.b_simple == found.per_leaf["b"].b_simple
        own = found.per_leaf["b"].noise_to_weight
        np.testing.assert_allclose(found.noise_to_weight, own, rtol=ROUNDING)
    else:
        # An overflow is no leaf that one may leave out.
        assert not found.valid


def test_a_step_with_a_leaf_that_is_not_finite_is_no_step():
    """As reject_nonfinite=False lets it pass."""
    steps = [synthetic(s, 1.0, d=2) for s in (1.0, 2.0, 1.5, 1.2)]
    params = {"a": jnp.ones(3), "b": jnp.ones(())}
    nan = steps[0]._replace(
        deviation=steps[0].deviation.at[0].set(np.nan),
        norm=steps[0].norm.at[0].set(np.nan),
    )
    tx = ost.estimate_noise_scale(scope="global")
    state, expected = feed(tx, [*steps, nan], params), feed(tx, steps, params)
    chex.assert_trees_all_equal(state.averages, expected.averages)
    chex.assert_trees_all_equal(state.size, expected.size)


def test_without_moments_the_remedy_is_named():
    tx, params = ost.estimate_noise_scale(), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="microbatch_gradients"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


@full
def test_moments_of_another_tree_are_refused():
    _, _, moments = ost.microbatch_gradients(regression_loss, 2)(
        {"w": jnp.zeros(D)}, draw_regression(jax.random.key(0), 4)
    )
    tx, params = ost.estimate_noise_scale(), {"v": jnp.ones(2), "w": jnp.ones(2)}
    with pytest.raises(ValueError, match="another tree"):
        tx.update(params, tx.init(params), moments=moments)


# --- the ratio to the weights --------------------------------------------------------


def test_noise_to_weight_is_the_plain_definition():
    """√(mean unbiased variance of the microbatch gradients / mean square of params)."""
    rng = np.random.default_rng(0)
    grads = {"a": rng.standard_normal((1, K, 5, 3)), "b": rng.standard_normal((1, K))}
    params = {"a": rng.standard_normal((5, 3)), "b": rng.standard_normal(())}
    as_float32 = functools.partial(jax.tree.map, np.float32)
    tx = ost.estimate_noise_scale()
    found = ost.noise_scale(run(tx, as_float32(grads), as_float32(params)))

    def ratio(grads, params):
        return np.sqrt(grads.var(0, ddof=1).mean() / np.square(params).mean())

    for name, leaf in found.per_leaf.items():
        expected = ratio(grads[name][0], params[name])
        np.testing.assert_allclose(leaf.noise_to_weight, expected, rtol=ROUNDING)
    flat = [np.concatenate([g[0].reshape(K, -1) for g in grads.values()], 1)]
    flat.append(np.concatenate([p.ravel() for p in params.values()]))
    np.testing.assert_allclose(found.noise_to_weight, ratio(*flat), rtol=ROUNDING)


@full
def test_noise_relative_to_parameters_of_zero():
    tx = ost.estimate_noise_scale()
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    noisy, silent = synthetic(1.0, 1.0, d=2), synthetic(0.0, 1.0, d=2)
    deviation = jnp.stack([noisy.deviation[0], silent.deviation[1]])
    state = feed(tx, [noisy._replace(deviation=deviation)], params)
    found = ost.noise_scale(state).per_leaf
    assert found["a"].noise_to_weight == np.inf
    assert found["b"].noise_to_weight == 0
    # Without the parameters it is not known.
    _, state = tx.update(params, tx.init(params), moments=noisy)
    assert np.isnan(ost.noise_scale(state).noise_to_weight)


# --- pairs of successive gradients ---------------------------------------------------


@full
def test_pairs_estimate_the_same_and_say_that_they_are_biased():
    noise = jax.random.normal(jax.random.key(5), (20_001, 1, VARIANCES.size))
    grads = MEAN[None, None] + noise * np.sqrt(VARIANCES / EACH)[None, None]
    tx = ost.estimate_noise_scale(decay=0.9999, difference=True)
    params = jnp.ones(VARIANCES.size)

    def step(state, grads):
        moments, mean = moments_of(grads, np.full(1, EACH, np.float32))
        return tx.update(mean, state, params, moments=moments)[1], None

    run_all = jax.jit(lambda s, g: jax.lax.scan(step, s, g))
    found = ost.noise_scale(run_all(tx.init(params), grads)[0])
    assert found.biased
    assert found.valid
    assert "biased" in repr(found)
    # Of 10,000 pairs; relative error √(2·20.5/10²/10,000) of the trace.
    np.testing.assert_allclose(found.trace, VARIANCES.sum(), rtol=SIGMAS * 0.0065)
    assert found.low < VARIANCES.sum() / 1.0 < found.high
    assert 6000 < found.steps < 10_000


ALIKE = np.ones(2, np.float32)
DIFFERENCE = ost.estimate_noise_scale(difference=True)
observe_difference = jax.jit(DIFFERENCE.update)


def feed_difference(values, state=None, **moments):
    """The state after gradients of eight examples, whose two entries are alike."""
    state = DIFFERENCE.init(ALIKE) if state is None else state
    moments = synthetic(1.0, 1.0, **{"k": 1} | moments)
    for value in values:
        gradient = np.float32(value) * ALIKE
        _, state = observe_difference(gradient, state, ALIKE, moments=moments)
    return state


def test_better_estimates_take_the_place_of_pairs():
    pairs = feed_difference([1.0, 3.0])
    assert pairs.biased
    fresh, later = (feed_difference([1.0], state, k=4) for state in (None, pairs))
    assert not later.biased
    chex.assert_trees_all_equal(later.averages, fresh.averages)
    # From then on pairs are not asked.
    later = feed_difference([1.0, 3.0, 5.0], later)
    assert not later.biased
    chex.assert_trees_all_equal(later.averages, fresh.averages)


def test_pairs_do_not_overlap():
    state = feed_difference([1.0, 3.0, 4.0, 8.0, 100.0])
    # ‖3 − 1‖² and ‖8 − 4‖² in two entries, 8·8/16 of it; ⟨1, 3⟩ and ⟨4, 8⟩. The first
    # trace is the unit of both.
    weights = [0.99, 1.0]
    averages = jax.tree.map(lambda x: x[0], state.averages)
    np.testing.assert_allclose(averages.total, sum(weights), ROUNDING)
    trace, grad_sq = (np.average(x, weights=weights) for x in ([32, 128], [6, 64]))
    np.testing.assert_allclose(averages.trace, trace / 32, ROUNDING)
    np.testing.assert_allclose(averages.grad_sq, grad_sq / 32, ROUNDING)


def test_a_gradient_that_is_not_finite_spoils_only_its_own_pair():
    state = None
    for value in (np.nan, 1.0, np.nan, 3.0, np.nan):
        state = feed_difference([value], state)
        chex.assert_tree_all_finite((state.averages, state.drift, state.pairs))
    # One pair: ‖3 − 1‖² in two entries, 8·8/16 of it, and ⟨3, 1⟩.
    found = ost.noise_scale(state)
    np.testing.assert_allclose(found.trace, 8 * 4)
    np.testing.assert_allclose(found.grad_sq, 6)
    assert state.averages.total[0] == 1


@full
def test_pairs_of_narrow_gradients_keep_the_type_of_the_state():
    tx, params = ost.estimate_noise_scale(difference=True), jnp.ones(2, jnp.bfloat16)
    state, one = tx.init(params), synthetic(1.0, 1.0, k=1)
    _, after = tx.update(jnp.ones(2), state, params, moments=one)
    chex.assert_trees_all_equal_dtypes(after, state)


# --- where moments come from, and what never enters ----------------------------------


def mlp(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] - 1))


def make_mlp(seed=0, rows=64):
    rng = np.random.default_rng(seed)
    params = {
        "in": rng.standard_normal((4, 8)).astype("f4"),
        "out": rng.standard_normal((8, 2)).astype("f4") / 3,
    }
    return params, rng.standard_normal((rows, 4)).astype("f4")


CHAIN = optax.chain(ost.estimate_noise_scale(), optax.sgd(0.0))


@functools.partial(jax.jit, static_argnames=("num_microbatches", "tx"))
def one_step(num_microbatches, params, x, tx=CHAIN):
    """The state of the chain after a step of so many microbatches."""
    _, grads, moments = ost.microbatch_gradients(mlp, num_microbatches)(params, x)
    return tx.update(grads, tx.init(params), params, moments=moments)[1]


@full
def test_in_a_step_across_steps_and_both_nested_say_the_same():
    params, x = make_mlp()
    parts = [x[i::8] for i in range(8)]
    scales = {}

    scales["in a step"] = one_step(8, params, x)

    across = ost.accumulate_moments(CHAIN, 8, mean_square=False)
    state, update = across.init(params), jax.jit(across.update)
    gradient = jax.jit(jax.grad(mlp))
    for part in parts:
        grads = gradient(params, part)
        _, state = update(grads, state, params, weight=float(len(part)))
    scales["across steps"] = state

    both = ost.accumulate_moments(CHAIN, 2, mean_square=False)
    state, update = both.init(params), jax.jit(both.update)
    gradients = jax.jit(ost.microbatch_gradients(mlp, 4))
    for half in (parts[:4], parts[4:]):
        # Microbatch k has every fourth row.
        rows = np.stack(half, 1).reshape(-1, 4)
        _, grads, moments = gradients(params, rows)
        _, state = update(grads, state, params, moments=moments)
    scales["both"] = state

    found = {name: ost.noise_scale(state) for name, state in scales.items()}
    for name, each in found.items():
        for key in ("trace", "grad_sq", "noise_to_weight"):
            expected = getattr(found["in a step"], key)
            np.testing.assert_allclose(
                getattr(each, key), expected, rtol=1e-4, err_msg=f"{name} {key}"
            )


@full
def test_a_rejected_microbatch_does_not_enter():
    params, x = make_mlp()
    spoilt = x.copy()
    spoilt[3] = np.nan
    state = one_step(8, params, spoilt)
    kept = np.concatenate([x[i::8][None] for i in range(8) if i != 3])
    rows = kept.swapaxes(0, 1).reshape(-1, 4)
    expected = one_step(7, params, rows)
    for key in ("trace", "grad_sq"):
        found = getattr(ost.noise_scale(state), key)
        true = getattr(ost.noise_scale(expected), key)
        np.testing.assert_allclose(found, true, rtol=1e-4)


@full
def test_a_skipped_step_does_not_enter():
    tx = ost.skip_spikes(ost.estimate_noise_scale())
    params = {"w": jnp.ones(())}
    _, state = tx.update(params, tx.init(params), params, moments=synthetic(1.0, 1.0))
    spoilt = {"w": jnp.float32(np.nan)}
    _, after = tx.update(spoilt, state, params, moments=synthetic(9.0, 9.0))
    assert after.metrics["skip/skipped"]
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@full
def test_a_clip_before_it_changes_nothing():
    params, x = make_mlp()
    clip = ost.clip_by_threshold(ost.thresholds.constant(1e-3))
    clipped = optax.chain(clip, ost.estimate_noise_scale())
    state, expected = (one_step(8, params, x, tx=tx) for tx in (clipped, CHAIN))
    chex.assert_trees_all_close(state[1], expected[0], rtol=ROUNDING)


@pytest.mark.parametrize("wrap", ["masked", "partition"])
@quick_only("masked")
def test_hidden_leaves_are_left_out(wrap):
    params, x = make_mlp()
    only_out = {"in": False, "out": True}
    tx = optax.masked(ost.estimate_noise_scale(), only_out)
    if wrap == "partition":
        groups = {True: ost.estimate_noise_scale(), False: optax.set_to_zero()}
        tx = optax.partition(groups, only_out)
    found = ost.noise_scale(one_step(8, params, x, tx=tx))
    assert list(found.per_leaf) == ["out"]
    expected = ost.noise_scale(one_step(8, params, x)).per_leaf["out"]
    for key in ("trace", "grad_sq", "noise_to_weight"):
        true = getattr(expected, key)
        np.testing.assert_allclose(getattr(found, key), true, rtol=ROUNDING)


# --- arguments and cost --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"decay": 1.0}, r"decay=1.0 is outside"),
        ({"decay": "x"}, "decay must be a number"),
        ({"half_life": 0.0}, r"half_life=0.0 is outside"),
        ({"confidence": 95}, r"confidence=95 is outside"),
        ({"scope": "leaves"}, r"scope='leaves' is unknown"),
    ],
)
def test_what_is_wrong_is_named(arguments, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ost.estimate_noise_scale(**arguments)


COPY = re.compile(r"f32\[1024,1024\]\S* copy\(")


# One after the other, and all at once: XLA counts the body of a loop once.
@pytest.mark.parametrize("vmap_size", [1, None])
@full
def test_it_needs_no_buffer_and_hardly_an_operation(vmap_size):
    size = 1024
    shape = jax.ShapeDtypeStruct((size, size), np.float32)
    params = {"in": shape, "out": shape}
    x = jax.ShapeDtypeStruct((8 * 512, size), np.float32)
    gradients = ost.microbatch_gradients(mlp, 8, vmap_size=vmap_size)

    def compile_step(tx):
        def step(params, state, x):
            loss, grads, moments = gradients(params, x)
            updates, state = tx.update(grads, state, params, moments=moments)
            return optax.apply_updates(params, updates), state, loss

        step = jax.jit(step, donate_argnums=(0, 1))
        state = jax.eval_shape(tx.init, params)
        return step.lower(params, state, x).compile()

    adam = ost.safe_adamw(1e-3)
    # In a bare chain XLA would keep a copy of the parameters for their norm.
    plain, ours = (
        compile_step(ost.skip_spikes(tx))
        for tx in (adam, optax.chain(ost.estimate_noise_scale(), adam))
    )
    copies = [len(COPY.findall(program.as_text())) for program in (plain, ours)]
    assert copies[1] <= copies[0]
    temp = [p.memory_analysis().temp_size_in_bytes for p in (plain, ours)]
    assert temp[1] - temp[0] < 4 * size**2 / 16
    flops = [p.cost_analysis()["flops"] for p in (plain, ours)]
    assert flops[1] / flops[0] - 1 < 0.01
