"""Accumulation: its formulas in float64, and the defects of MultiSteps.

The reference is NumPy written from the docstring of ``accumulate_moments``; a spy in
the place of the inner optimizer shows what that is given, and when.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import full, quick_only

import optax_stability as ost

# A few roundings of float32 in a row.
ROUNDING = 1e-6
# Adam divides a mean by its size: where that nearly cancels, so do the digits.
ADAM = 2e-5
HALF_ULP = 2.0**-24

PARAMS = {
    "body": {"w": np.ones((2, 3), np.float32), "b": np.full(4, 2.0, np.float32)},
    "gain": np.full((), 3.0, np.float32),
}
ZEROS = jax.tree.map(np.zeros_like, PARAMS)
MICROBATCH = functools.partial(ost.scale_by_safe_adam, second_moment="microbatch")


def grads_of(seed, scale=1.0, like=PARAMS):
    """A random gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (scale * rng.standard_normal(x.shape)).astype(x.dtype), like
    )


def several(count, seed=0, like=PARAMS):
    return [grads_of(1000 * seed + i, like=like) for i in range(count)]


def spoilt(grads, entry):
    """The gradient with this in one entry."""
    return {**grads, "body": {**grads["body"], "b": grads["body"]["b"] * entry}}


def to_bfloat16(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def bits(tree):
    """The bits of every leaf, so that −0, NaN and rounding are compared exactly."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def is_zero(updates):
    """Whether all is 0, and none of it −0."""
    return bits(updates) == bits(jax.tree.map(jnp.zeros_like, updates))


def steps_taken(updates):
    """The calls whose update is not 0."""
    return [
        i for i, tree in enumerate(updates) if any(map(np.any, jax.tree.leaves(tree)))
    ]


def negative(tree):
    return jax.tree.map(np.negative, tree)


@functools.cache
def compiled(tx):
    def update(grads, state, params, extra):
        return tx.update(grads, state, params, **extra)

    return jax.jit(update)


@functools.cache
def compiled_for_any_k(make, inner):
    """The K is traced, so that every test of this inner compiles it once."""

    def update(every_k, grads, state, params, extra):
        return make(inner, every_k).update(grads, state, params, **extra)

    return jax.jit(update)


def multi_steps(inner, every_k):
    return optax.MultiSteps(inner, lambda _: every_k)


def loop(update, state, stream, extras, params, *, moving=False):
    """The updates and states of several calls; if moving, the parameters follow."""
    updates, states = [], []
    for grads, extra in zip(stream, extras or [{}] * len(stream), strict=True):
        update_now, state = update(grads, state, params, extra)
        updates.append(update_now)
        states.append(state)
        params = jax.tree.map(np.add, params, update_now) if moving else params
    return updates, states


def run(tx, stream, extras=None, *, params=PARAMS, state=None, **options):
    state = tx.init(params) if state is None else state
    return loop(compiled(tx), state, stream, extras, params, **options)


def accumulate(
    inner,
    every_k,
    stream,
    extras=None,
    *,
    params=PARAMS,
    state=None,
    make=ost.accumulate_moments,
    **options,
):
    """As ``run`` with ``make(inner, every_k)``."""
    update = functools.partial(compiled_for_any_k(make, inner), every_k)
    state = make(inner, 1).init(params) if state is None else state
    return loop(update, state, stream, extras, params, **options)


SGD = optax.sgd(1.0)


# --- the reference, and the spy --------------------------------------------------


class Window(NamedTuple):
    """What the docstring says of the kept microbatches, in float64."""

    number: int
    weight: float
    mean: Any
    deviation: np.ndarray
    mean_square: Any
    value: float
    largest: Any  # |mₖ| of each entry, for the bounds
    rise: float  # largest nₖ·Nₖ/Nₖ₋₁, for the bounds

    def mean_bound(self):
        """Half an ulp of the largest |mₖ| for every addition, and some for the last.

        Each call adds one rounding of a number ≤ max|mₖ|, and, times its share of the
        weight, four of a difference ≤ 2·max|mₖ|; shares of the total add up to 1.
        """
        return jax.tree.map(
            lambda m: HALF_ULP * (self.number + 8) * m + 1e-37, self.largest
        )

    def deviation_bound(self):
        """What those errors of the mean make of Σ nₖ·Nₖ/Nₖ₋₁·‖mₖ − ḡₖ‖²."""
        bounds = jax.tree.leaves(self.mean_bound())
        errors = [self.number * self.rise * np.sum(np.square(b)) for b in bounds]
        mixed = 2 * np.sqrt(np.array(errors) * self.deviation)
        return errors + mixed + 2e-6 * (1 + self.number) * self.deviation + 1e-37


def window_of(microbatches, weights=None, losses=None):
    """N, ḡ, deviation and mean_square from their formulas."""
    n = np.ones(len(microbatches)) if weights is None else np.array(weights, float)
    losses = np.zeros(len(n)) if losses is None else np.array(losses, float)
    m = jax.tree.map(lambda *leaves: np.stack(to_float64(leaves)), *microbatches)
    mean = jax.tree.map(lambda x: np.tensordot(n, x, 1) / n.sum(), m)
    distances = jax.tree.map(lambda x, g: np.tensordot(n, (x - g) ** 2, 1), m, mean)
    totals = np.cumsum(n)
    return Window(
        number=len(n),
        weight=n.sum(),
        mean=mean,
        deviation=np.array([d.sum() for d in jax.tree.leaves(distances)]),
        mean_square=jax.tree.map(lambda x: np.tensordot(n, x * x, 1) / n.sum(), m),
        value=np.dot(n, losses) / n.sum(),
        largest=jax.tree.map(lambda x: np.abs(x).max(axis=0), m),
        rise=max(n[1:] * totals[1:] / totals[:-1], default=0.0),
    )


class SpyState(NamedTuple):
    """How often it was called, and what it was given the last time."""

    calls: jax.Array
    mean: Any
    number: jax.Array
    weight: jax.Array
    deviation: jax.Array
    mean_square: Any
    norm: jax.Array
    value: jax.Array
    loss: jax.Array
    tag: jax.Array


def spy():
    """Keeps what it is given, and returns ten times the gradient."""

    def init(params):
        n_leaves = len(jax.tree.leaves(params))
        zero = jnp.zeros(())
        return SpyState(
            calls=jnp.zeros((), jnp.int32),
            mean=optax.tree.zeros_like(params),
            number=jnp.zeros((), jnp.int32),
            weight=zero,
            deviation=jnp.zeros(n_leaves),
            mean_square=optax.tree.zeros_like(params, dtype=jnp.float32),
            norm=jnp.zeros(n_leaves),
            value=zero,
            loss=zero,
            tag=zero,
        )

    def update(updates, state, params=None, *, moments, value=-1, loss=-1, tag=-1, **_):
        state = SpyState(
            calls=state.calls + 1,
            mean=updates,
            number=moments.num_microbatches,
            weight=moments.weight,
            deviation=moments.deviation,
            mean_square=moments.mean_square,
            norm=moments.norm,
            value=jnp.float32(value),
            loss=jnp.float32(loss),
            tag=jnp.float32(tag),
        )
        return jax.tree.map(lambda x: 10 * x, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


SPY = spy()


watch = functools.partial(accumulate, SPY)


def assert_within(found, expected, bounds):
    jax.tree.map(
        lambda x, y, b: np.testing.assert_array_less(np.abs(np.float64(x) - y), b),
        *(found, expected, bounds),
    )


def assert_given(seen: SpyState, window: Window, *, sharded=False):
    """The spy was given the mean and the moments of this window."""
    assert int(seen.number) == window.number
    np.testing.assert_allclose(seen.weight, window.weight, rtol=ROUNDING)
    assert_within(seen.mean, window.mean, window.mean_bound())
    np.testing.assert_array_less(
        np.abs(seen.deviation - window.deviation), window.deviation_bound()
    )
    squares = jax.tree.map(
        lambda m, b: 2 * (m + 1e-37) * b + 1e-37, window.largest, window.mean_bound()
    )
    assert_within(seen.mean_square, window.mean_square, squares)
    if not sharded:  # Else it is that of the local shard.
        norms = [np.linalg.norm(x) for x in jax.tree.leaves(to_float64(seen.mean))]
        np.testing.assert_allclose(seen.norm, norms, rtol=ROUNDING)


# --- the rule, against the reference ---------------------------------------------


class Microbatch(NamedTuple):
    """One call of a random stream."""

    every_k: int
    weight: float
    loss: float
    scale: float
    entry: float  # by which some entries are multiplied

    def kept(self):
        finite = np.isfinite([self.entry, self.loss, self.weight]).all()
        return bool(finite and self.weight > 0)


def microbatches():
    usual = st.floats(2.0**-8, 2.0**8, width=32)
    return st.builds(
        Microbatch,
        every_k=st.integers(1, 6),
        weight=usual | usual | st.sampled_from([1.0, 0.0, -1.0, np.nan, np.inf]),
        loss=st.floats(-10, 10, width=32) | st.sampled_from([np.nan, np.inf, 1.0]),
        scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
        entry=st.just(1.0) | st.sampled_from([np.nan, np.inf, -np.inf, 1.0, 1.0]),
    )


@hypothesis.settings(derandomize=True, max_examples=40, deadline=None)
@hypothesis.given(st.lists(microbatches(), min_size=1, max_size=24))
def test_every_window_is_that_of_the_formulas(stream):
    """Any weights and faults, and a K that changes with every call."""
    state = ost.accumulate_moments(SPY, 1).init(PARAMS)
    window, calls, rejected = [], 0, 0
    for i, each in enumerate(stream):
        before = state
        grads = spoilt(grads_of(i, each.scale), np.float32(each.entry))
        extra = {"weight": each.weight, "value": each.loss}
        (updates,), (state,) = watch(each.every_k, [grads], [extra], state=before)
        window.append((grads, each))
        rejected += not each.kept()
        kept = [(g, e) for g, e in window if e.kept()]
        full = len(window) >= each.every_k
        steps = full and bool(kept)
        calls += steps
        if steps:
            trees, infos = zip(*kept, strict=True)
            weights, losses = [e.weight for e in infos], [e.loss for e in infos]
            expected = window_of(trees, weights, losses)
            seen = state.inner_opt_state
            assert_given(seen, expected)
            np.testing.assert_allclose(seen.value, expected.value, rtol=0, atol=1e-4)
            chex.assert_trees_all_equal(
                updates, jax.tree.map(lambda x: 10 * x, seen.mean)
            )
        else:
            assert is_zero(updates)
            assert bits(state.inner_opt_state) == bits(before.inner_opt_state)
        assert bool(ost.has_updated(state)) == steps
        assert int(state.gradient_step) == int(state.inner_opt_state.calls) == calls
        assert int(state.rejected_total) == rejected
        window = [] if full else window
        assert int(state.mini_step) == len(window)


# --- a large batch in parts ------------------------------------------------------

INNERS = {
    "sgd": (SGD, ROUNDING),
    "momentum": (optax.sgd(0.5, momentum=0.9, nesterov=True), ROUNDING),
    "adam": (optax.adam(0.1), ADAM),
    "safe adamw": (ost.safe_adamw(0.1, weight_decay=0.1), ADAM),
}


@pytest.mark.parametrize("name", INNERS)
@quick_only("safe adamw", "momentum")
def test_the_steps_are_those_of_the_large_batch(name):
    inner, tolerance = INNERS[name]
    stream = several(12)
    found, _ = accumulate(inner, 4, stream, moving=True)
    means = [window_of(stream[i : i + 4]).mean for i in (0, 4, 8)]
    means = [jax.tree.map(np.float32, mean) for mean in means]
    expected, _ = run(inner, means, moving=True)
    assert steps_taken(found) == [3, 7, 11]
    for update, large in zip(found[3::4], expected, strict=True):
        chex.assert_trees_all_close(update, large, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", INNERS)
@quick_only("sgd")
def test_one_microbatch_per_step_is_the_bare_optimizer(name):
    inner, _ = INNERS[name]
    found, _ = accumulate(inner, 1, several(3), moving=True)
    expected, _ = run(inner, several(3), moving=True)
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)


def test_a_single_microbatch_reaches_inner_bit_for_bit():
    stream = several(3)
    _, states = watch(1, stream)
    for grads, state in zip(stream, states, strict=True):
        assert bits(state.inner_opt_state.mean) == bits(grads)
        np.testing.assert_array_equal(state.inner_opt_state.deviation, 0.0)


@full
def test_in_float64_two_parts_are_their_mean_to_the_last_bits():
    with jax.enable_x64(True):
        like = to_float64(PARAMS)
        stream = several(4, like=like)
        tx = ost.accumulate_moments(SGD, 2, accumulator_dtype=jnp.float64)
        updates, states = run(tx, stream, params=like)
        for at in (1, 3):
            expected = negative(window_of(stream[at - 1 : at + 1]).mean)
            chex.assert_trees_all_close(updates[at], expected, rtol=0, atol=2.0**-50)
    for tree in (updates[1], states[1].acc_grads):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype("float64")}


@pytest.mark.parametrize("count", [3, 8, 64])
def test_the_order_of_microbatches_does_not_matter(count):
    stream = several(count, seed=count)
    window, rng = window_of(stream), np.random.default_rng(count)
    for order in (range(count), range(count)[::-1], rng.permutation(count)):
        _, states = watch(count, [stream[i] for i in order])
        assert_given(states[-1].inner_opt_state, window)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_mean_is_within_the_bound_that_is_promised(count):
    """2⁻²² of the largest |mₖ|."""
    like = {"w": np.zeros(3000, np.float32)}
    rng = np.random.default_rng(count)
    for stream in (
        several(count, like=like),
        [{"w": rng.uniform(0.5, 1, 3000).astype(np.float32)} for _ in range(count)],
    ):
        _, states = watch(count, stream, params=like)
        window = window_of(stream)
        bound = jax.tree.map(lambda m: 2.0**-22 * m, window.largest)
        assert_within(states[-1].inner_opt_state.mean, window.mean, bound)


def test_equal_microbatches_have_their_own_mean_and_no_deviation():
    _, states = watch(7, [grads_of(0)] * 7)
    seen = states[-1].inner_opt_state
    chex.assert_trees_all_equal(seen.mean, grads_of(0))
    np.testing.assert_array_equal(seen.deviation, 0.0)


# --- weights, losses, extra arguments --------------------------------------------


def test_microbatches_of_unequal_length_count_by_their_tokens():
    lengths = [7, 1, 0, 24]
    tokens = [several(n, seed=i) for i, n in enumerate(lengths)]
    # A microbatch without a token has the mean 0/0.
    nothing = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS)
    means = [window_of(each).mean if each else nothing for each in tokens]
    means = [jax.tree.map(np.float32, mean) for mean in means]
    losses = [1.0, 33.0, np.nan, 2.0]
    extras = [
        {"weight": n, "value": loss} for n, loss in zip(lengths, losses, strict=True)
    ]
    _, states = watch(4, means, extras)
    seen = states[-1].inner_opt_state
    everything = window_of([grads for each in tokens for grads in each])
    chex.assert_trees_all_close(seen.mean, everything.mean, rtol=1e-5, atol=1e-6)
    assert float(seen.value) == pytest.approx((7 + 33 + 48) / 32, rel=ROUNDING)
    assert float(seen.weight) == 32
    assert int(seen.number) == 3
    of_means = window_of([means[i] for i in (0, 1, 3)]).mean
    assert abs(float(seen.mean["gain"]) - of_means["gain"]) > 0.1


@pytest.mark.parametrize("weight", [0.0, -2.0, np.nan, np.inf, -np.inf])
def test_a_microbatch_of_no_usable_weight_is_not_kept(weight):
    stream = several(3)
    extras = [{"weight": w, "value": 1.0} for w in (2.0, weight, 3.0)]
    _, states = watch(3, stream, extras)
    assert_given(states[-1].inner_opt_state, window_of(stream[::2], [2, 3]))
    assert states[-1].rejected_total == 1


@pytest.mark.parametrize("name", ["value", "loss"])
def test_the_mean_loss_is_handed_over_by_its_name(name):
    extras = [
        {name: loss, "weight": weight}
        for loss, weight in ((1.0, 1.0), (np.nan, 50.0), (4.0, 2.0), (6.0, 1.0))
    ]
    _, states = watch(4, several(4), extras)
    seen = states[-1].inner_opt_state
    assert float(getattr(seen, name)) == pytest.approx(15 / 4, rel=ROUNDING)
    other = "loss" if name == "value" else "value"
    assert float(getattr(seen, other)) == -1
    assert float(states[-1].value) == float(getattr(seen, name))


def test_the_loss_of_one_window_does_not_enter_the_next():
    losses = [1.0, 3.0, np.nan, 10.0, np.nan, np.nan, 7.0, 8.0]
    extras = [{"value": loss, "weight": 1.0} for loss in losses]
    _, states = watch(2, several(8), extras)
    seen = [float(state.inner_opt_state.value) for state in states[1::2]]
    assert seen == [2.0, 10.0, 10.0, 7.5]
    assert float(states[5].value) == 0


def test_without_a_loss_none_is_handed_over():
    _, states = watch(2, several(2))
    seen = states[-1].inner_opt_state
    assert float(seen.value) == float(seen.loss) == -1
    assert float(states[-1].value) == 0


def test_other_arguments_are_those_of_the_last_call():
    _, states = watch(3, several(6), [{"tag": float(i)} for i in range(6)])
    assert [float(s.inner_opt_state.tag) for s in states] == [0, 0, 2, 2, 2, 5]


def test_an_inner_that_takes_no_extra_arguments_is_given_none():
    inner = optax.GradientTransformation(lambda _: (), lambda g, s, p=None: (g, s))
    updates, _ = accumulate(inner, 1, several(1), [{"value": 1.0}])
    chex.assert_trees_all_equal(updates, several(1))


def test_the_parameters_reach_inner():
    updates, _ = accumulate(optax.add_decayed_weights(0.5), 2, [ZEROS] * 2)
    chex.assert_trees_all_close(updates[1], jax.tree.map(lambda p: 0.5 * p, PARAMS))


# --- what MultiSteps gets wrong --------------------------------------------------

FAULTS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def is_finite(tree):
    return all(np.isfinite(to_float64(x)).all() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", range(4))
def test_one_bad_microbatch_is_left_out_and_multi_steps_never_recovers(
    place, fault, dtype
):
    cast = to_bfloat16 if dtype == "bfloat16" else lambda tree: tree
    good = [cast(grads) for grads in several(8)]
    stream, params = [*good], cast(PARAMS)
    stream[place] = spoilt(good[place], jnp.asarray(FAULTS[fault], dtype))
    updates, states = accumulate(SGD, 4, stream, params=params)
    assert steps_taken(updates) == [3, 7]
    kept = good[:place] + good[place + 1 : 4]
    tolerance = ROUNDING if dtype == "float32" else 2.0**-8
    for found, members in ((updates[3], kept), (updates[7], good[4:])):
        expected = negative(window_of(members).mean)
        chex.assert_trees_all_close(
            to_float64(found), expected, rtol=tolerance, atol=tolerance / 10
        )
    assert int(states[-1].rejected_total) == 1
    theirs, _ = accumulate(SGD, 4, stream, params=params, make=multi_steps)
    assert not any(map(is_finite, (theirs[3], theirs[7])))


@pytest.mark.parametrize("place", range(4))
def test_a_nan_loss_rejects_its_microbatch_though_the_gradient_is_finite(place):
    stream = several(4)
    losses = [np.nan if i == place else 1.0 + i for i in range(4)]
    _, states = watch(4, stream, [{"value": loss, "weight": 1.0} for loss in losses])
    seen = states[-1].inner_opt_state
    assert_given(seen, window_of(stream[:place] + stream[place + 1 :]))
    assert float(seen.value) == pytest.approx(np.nanmean(losses), rel=ROUNDING)
    # MultiSteps hands on the loss of the last call, whatever it is.
    extras = [{"value": loss} for loss in losses]
    _, theirs = accumulate(LAST_LOSS, 4, stream, extras, make=multi_steps)
    np.testing.assert_array_equal(theirs[-1].inner_opt_state, losses[-1])


def last_loss():
    """A transformation whose state is the loss that it was given."""

    def update(updates, state, params=None, *, value, **extra_args):
        return updates, jnp.asarray(value, jnp.float32)

    return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)


LAST_LOSS = last_loss()


def test_extra_arguments_arrive_in_a_chain():
    extras = [{"value": 2.0}, {"value": 4.0}]
    ours = optax.chain(ost.accumulate_moments(LAST_LOSS, 2))
    _, states = run(ours, several(2), extras)
    assert float(states[-1][0].inner_opt_state) == 3.0
    multi = optax.MultiSteps(LAST_LOSS, 2).gradient_transformation()
    with pytest.raises(TypeError, match="value"):
        run(optax.chain(multi), several(2), extras)


def test_a_rejected_microbatch_does_not_shift_the_calendar():
    stream = several(4)
    stream[1] = spoilt(stream[1], np.nan)
    ours, _ = accumulate(SGD, 2, stream)
    multi = optax.MultiSteps(SGD, 2, should_skip_update_fn=optax.skip_not_finite)
    theirs, _ = run(multi, stream)
    assert steps_taken(ours) == [1, 3]
    assert steps_taken(theirs) == [2]


def test_an_inf_in_the_first_of_two_does_not_touch_the_parameters():
    """Zero times Inf is NaN: MultiSteps destroys them before the window is full."""
    stream = [spoilt(grads_of(0), np.inf), grads_of(1)]
    ours, _ = accumulate(SGD, 2, stream)
    assert is_zero(ours[0])
    chex.assert_trees_all_close(ours[1], negative(grads_of(1)), rtol=ROUNDING)
    theirs, _ = accumulate(SGD, 2, stream, make=multi_steps)
    assert not is_finite(theirs[0])


def test_inner_does_not_run_before_the_window_is_full():
    """The one here makes NaN of a gradient of ones, and tells each time it runs."""
    ran = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: ran.append(1))
        return jax.tree.map(lambda g: (g - 1) / (g - 1), updates), state + 1

    inner = optax.GradientTransformation(lambda _: jnp.zeros(()), update)
    stream = [jax.tree.map(lambda x, c=c: np.full_like(x, c), PARAMS) for c in (1, 3)]
    ours, states = accumulate(inner, 2, stream * 2)
    assert is_zero(ours[0])
    assert is_finite(ours)
    assert [float(state.inner_opt_state) for state in states] == [0, 1, 1, 2]
    jax.effects_barrier()
    assert len(ran) == 2
    theirs, _ = accumulate(inner, 2, stream, make=multi_steps)
    jax.effects_barrier()
    assert len(ran) == 4
    assert not is_finite(theirs[0])


def test_a_window_without_one_kept_microbatch_takes_no_step():
    inner = optax.adam(lambda step: 1.0 + step)
    stream = several(6)
    bad = [spoilt(grads, np.nan) for grads in stream[2:4]]
    updates, states = accumulate(inner, 2, [*stream[:2], *bad, *stream[4:]])
    assert steps_taken(updates) == [1, 5]
    assert all(is_zero(updates[i]) for i in (0, 2, 3, 4))
    assert bits(states[3].inner_opt_state) == bits(states[1].inner_opt_state)
    assert [int(s.gradient_step) for s in states] == [0, 1, 1, 1, 1, 2]
    assert [bool(ost.has_updated(s)) for s in states] == [0, 1, 0, 0, 0, 1]
    assert [int(s.mini_step) for s in states] == [1, 0, 1, 0, 1, 0]
    without, last = accumulate(inner, 2, [*stream[:2], *stream[4:]])
    assert bits(updates[5]) == bits(without[3])
    assert bits(states[5].inner_opt_state) == bits(last[3].inner_opt_state)


def resumed(make, stream, at, first, then):
    """The updates of a run whose K changes before call ``at``."""
    early, states = accumulate(SGD, first, stream[:at], make=make)
    late, _ = accumulate(SGD, then, stream[at:], make=make, state=states[-1])
    return early + late


@pytest.mark.parametrize(
    ("at", "first", "then", "windows"),
    [
        (5, 8, 4, [(0, 6), (6, 10)]),  # it holds more than enough already
        (3, 8, 4, [(0, 4), (4, 8), (8, 12)]),
        (3, 4, 8, [(0, 8)]),
        (1, 2, 3, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        (9, 10, 1, [(0, 10), (10, 11), (11, 12)]),
    ],
)
def test_another_k_in_the_middle_of_a_window_loses_and_mixes_nothing(
    at, first, then, windows
):
    stream = several(12)
    updates = resumed(ost.accumulate_moments, stream, at, first, then)
    assert steps_taken(updates) == [end - 1 for _, end in windows]
    for start, end in windows:
        expected = negative(window_of(stream[start:end]).mean)
        chex.assert_trees_all_close(updates[end - 1], expected, rtol=1e-5, atol=1e-6)


def test_multi_steps_weighs_wrongly_when_k_becomes_smaller():
    """Six would be enough for four: it waits for two more, and counts from 2 again."""
    stream = several(12)
    updates = resumed(multi_steps, stream, 5, 8, 4)
    assert steps_taken(updates) == [7, 11]
    theirs = float(updates[7]["gain"])
    for start in range(8):
        mean = window_of(stream[start:8]).mean["gain"]
        assert abs(theirs + mean) > 0.01


# --- dtypes ----------------------------------------------------------------------


def test_gradients_in_bfloat16_are_added_up_in_float32():
    """In bfloat16 the mean of 1 and many 1 + 2⁻⁷ would stay where it is."""
    large = to_bfloat16(jax.tree.map(np.ones_like, PARAMS))
    small = jax.tree.map(lambda x: x * (1 + 2.0**-7), large)
    _, states = accumulate(SGD, 99, [large] + [small] * 15, params=large)
    for leaf in jax.tree.leaves(states[-1].acc_grads):
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, 1 + 15 / 16 * 2.0**-7, rtol=ROUNDING)


def test_inner_is_given_the_mean_in_the_dtype_of_the_gradients():
    stream = [to_bfloat16(grads) for grads in several(3)]
    updates, states = watch(3, stream, params=to_bfloat16(PARAMS))
    window, seen = window_of(stream), states[-1].inner_opt_state
    for tree in (seen.mean, updates[-1], updates[0]):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_close(
        to_float64(seen.mean), window.mean, rtol=2.0**-8, atol=1e-6
    )
    np.testing.assert_allclose(seen.deviation, window.deviation, rtol=1e-5)
    chex.assert_trees_all_close(seen.mean_square, window.mean_square, rtol=1e-5)
    norms = [np.linalg.norm(x) for x in jax.tree.leaves(to_float64(seen.mean))]
    np.testing.assert_allclose(seen.norm, norms, rtol=ROUNDING)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@quick_only("bfloat16")
def test_the_accumulator_may_be_narrower(dtype):
    """The update is not: a third of the mean needs all digits of float32."""
    third = optax.scale(1 / 3)
    tx = ost.accumulate_moments(third, 3, accumulator_dtype=dtype, mean_square=False)
    stream = several(6)
    stream[1] = spoilt(stream[1], np.nan)
    updates, states = run(tx, stream)
    for at, members in ((2, stream[:3:2]), (5, stream[3:])):
        held = states[at].acc_grads
        assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype(dtype)}
        mean = window_of(members).mean
        chex.assert_trees_all_close(to_float64(held), mean, rtol=0, atol=2.0**-6)
        expected = jax.tree.map(lambda x: x / 3, to_float64(held))
        chex.assert_trees_all_close(updates[at], expected, rtol=ROUNDING)
        assert {x.dtype for x in jax.tree.leaves(updates[at])} == {np.dtype("float32")}


def test_without_a_mean_square_there_is_no_buffer_for_it():
    tx = ost.accumulate_moments(SGD, 2, mean_square=False)
    _, states = run(tx, several(2))
    assert states[-1].moments.mean_square is None
    np.testing.assert_allclose(
        states[-1].moments.deviation, window_of(several(2)).deviation, rtol=1e-5
    )
    size = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    held = sum(x.nbytes for x in jax.tree.leaves(states[-1]))
    assert size < held < size + 100


def test_entries_up_to_8e37_are_kept_and_larger_ones_are_not():
    entries = (8e37, -8e37, 9e37, -9e37)
    stream = [{**grads_of(0), "gain": np.float32(entry)} for entry in entries]
    _, states = watch(4, stream)
    seen = states[-1].inner_opt_state
    assert int(states[-1].rejected_total) == 2
    # Opposite ones cancel, but for the rounding of each.
    assert abs(float(seen.mean["gain"])) < 1e31
    assert np.isinf(seen.deviation[2])
    assert np.isfinite(seen.deviation[:2]).all()
    assert is_finite(seen.mean_square)


def test_what_is_not_finite_is_kept_on_request_and_for_one_window_only():
    tx = ost.accumulate_moments(SGD, 2, reject_nonfinite=False)
    stream = several(4)
    stream[0] = spoilt(stream[0], np.nan)
    updates, states = run(tx, stream)
    assert np.isnan(updates[1]["body"]["b"]).all()
    assert is_finite(updates[1]["body"]["w"])
    assert is_zero(updates[0])
    expected = negative(window_of(stream[2:]).mean)
    chex.assert_trees_all_close(updates[3], expected, rtol=1e-5, atol=1e-6)
    assert int(states[-1].rejected_total) == 0


@pytest.mark.parametrize(
    "params",
    [{}, {"none": None, "empty": np.ones((0, 3), np.float32), "one": np.float32(2)}],
    ids=["no leaf", "an empty leaf"],
)
def test_odd_trees_work(params):
    grads = jax.tree.map(np.asarray, params)
    updates, states = watch(2, [grads] * 2, params=params)
    assert bool(ost.has_updated(states[-1]))
    chex.assert_trees_all_close(updates[-1], jax.tree.map(lambda g: 10 * g, grads))


# --- the clock -------------------------------------------------------------------


def test_every_k_may_follow_the_gradient_step():
    _, states = run(ost.accumulate_moments(SPY, lambda step: 1 + step), several(10))
    assert [bool(ost.has_updated(s)) for s in states] == [1, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    seen = states[-1].inner_opt_state
    assert_given(seen, window_of(several(10)[6:]))
    assert int(seen.calls) == 4


@full
def test_every_k_is_usually_a_plain_integer():
    _, states = run(ost.accumulate_moments(SGD, 3), several(3))
    assert [bool(ost.has_updated(state)) for state in states] == [0, 0, 1]


def test_schedules_inside_count_gradient_steps():
    inner = optax.sgd(lambda step: 2.0**-step)
    updates, _ = accumulate(inner, 2, [jax.tree.map(np.ones_like, PARAMS)] * 6)
    assert [-float(update["gain"]) for update in updates] == [0, 1, 0, 0.5, 0, 0.25]


def test_between_steps_the_state_of_inner_keeps_every_bit():
    """Also those of what is −0 or NaN."""
    inner = INNERS["adam"][0]
    state = ost.accumulate_moments(inner, 3).init(PARAMS)
    adam = state.inner_opt_state[0]
    mu = {**adam.mu, "gain": np.float32(-0.0)}
    nu = {**adam.nu, "gain": np.float32(np.nan)}
    odd = adam._replace(mu=mu, nu=nu), *state.inner_opt_state[1:]
    state = state._replace(inner_opt_state=odd)
    _, states = accumulate(inner, 3, several(3), state=state)
    for each in states[:2]:
        assert bits(each.inner_opt_state) == bits(state.inner_opt_state)
    assert bits(states[2].inner_opt_state) != bits(state.inner_opt_state)


def test_metrics_tell_the_place_in_the_window_and_the_rejected():
    stream = several(5)
    stream[1] = spoilt(stream[1], np.nan)
    _, states = accumulate(INNERS["safe adamw"][0], 3, stream)
    found = [ost.metrics(state) for state in states]
    assert [int(m["accumulate/mini_step"]) for m in found] == [1, 2, 0, 1, 2]
    assert [int(m["accumulate/rejected_total"]) for m in found] == [0, 1, 1, 1, 1]
    assert "adam/update_rms" in found[0]


def test_counters_stop_at_the_largest_integer():
    largest = jnp.int32(2**31 - 1)
    full = ost.accumulate_moments(SGD, 1).init(PARAMS)
    full = full._replace(gradient_step=largest, rejected_total=largest)
    stream = [grads_of(0), spoilt(grads_of(0), np.nan)]
    _, states = accumulate(SGD, 1, stream, state=full)
    assert int(states[-1].gradient_step) == int(states[-1].rejected_total) == largest


def test_reverse_mode_passes():
    """The derivative is that of the inner transformation."""

    def slope(tx):
        def loss(grads):
            return optax.tree.norm(tx.update(grads, tx.init(PARAMS))[0])

        return jax.jit(jax.grad(loss))(grads_of(0))

    found, expected = slope(ost.accumulate_moments(SGD, 1)), slope(SGD)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


# --- flush -----------------------------------------------------------------------


@functools.cache
def flushing(inner):
    return jax.jit(functools.partial(ost.flush, inner))


FROM_SQUARES = MICROBATCH(0.9, 0.99)


@pytest.mark.parametrize("count", [1, 2, 3])
@quick_only("2")
def test_flush_takes_the_step_that_a_full_window_would_have_taken(count):
    stream = several(4 + count)
    stream[4] = spoilt(stream[4], np.nan) if count > 1 else stream[4]
    _, states = accumulate(FROM_SQUARES, 4, stream)
    updates, state = flushing(FROM_SQUARES)(states[-1], PARAMS)
    expected, ends = accumulate(FROM_SQUARES, count, stream[4:], state=states[3])
    close = functools.partial(chex.assert_trees_all_close, rtol=ROUNDING, atol=ROUNDING)
    close(updates, expected[-1])
    close(state, ends[-1])
    assert bool(ost.has_updated(state))


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_flush_hands_over_what_the_window_holds(jit):
    stream = several(3)
    extras = [{"weight": w, "value": v} for w, v in ((1, 3.0), (2, 6.0), (1, 9.0))]
    _, states = watch(9, stream, extras)
    flush = flushing(SPY) if jit else functools.partial(ost.flush, SPY)
    updates, state = flush(states[-1], PARAMS, tag=7.0)
    seen = state.inner_opt_state
    assert_given(seen, window_of(stream, [1, 2, 1]))
    assert float(seen.value) == 6.0
    assert float(seen.tag) == 7.0
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 10 * x, seen.mean))


def test_a_loss_that_is_given_to_flush_takes_the_place_of_the_mean():
    _, states = watch(9, several(1), [{"weight": 1.0, "value": 3.0}])
    _, state = flushing(SPY)(states[-1], PARAMS, value=5.0)
    assert float(state.inner_opt_state.value) == 5.0


def test_after_a_flush_the_next_window_is_a_new_one():
    stream = several(5)
    _, states = watch(3, stream[:2])
    _, state = flushing(SPY)(states[-1], PARAMS)
    assert int(state.mini_step) == 0
    assert int(state.gradient_step) == 1
    _, states = watch(3, stream[2:], state=state)
    assert [bool(ost.has_updated(each)) for each in states] == [False, False, True]
    seen = states[-1].inner_opt_state
    assert_given(seen, window_of(stream[2:]))
    assert int(seen.calls) == int(states[-1].gradient_step) == 2


def nothing_kept():
    """States whose window holds no microbatch, and why."""
    bad = spoilt(grads_of(9), np.nan)
    return {
        "before the first call": ost.accumulate_moments(SPY, 3).init(PARAMS),
        "after a step": watch(3, several(3))[1][-1],
        "all rejected": watch(3, [*several(3), bad, bad])[1][-1],
        "after a flush": flushing(SPY)(watch(3, several(2))[1][-1], PARAMS)[1],
    }


def test_flush_of_nothing_changes_nothing():
    for why, state in nothing_kept().items():
        updates, after = flushing(SPY)(state, PARAMS)
        assert is_zero(updates), why
        assert bits(after.inner_opt_state) == bits(state.inner_opt_state), why
        assert int(after.gradient_step) == int(state.gradient_step), why
        assert int(after.mini_step) == 0, why
        assert not bool(ost.has_updated(after)), why
        assert int(after.rejected_total) == int(state.rejected_total), why


def test_flush_gives_inner_the_dtype_of_the_parameters():
    like = to_bfloat16(PARAMS)
    inner = optax.sgd(1.0, momentum=0.9)
    stream = [to_bfloat16(grads) for grads in several(2)]
    _, states = accumulate(inner, 4, stream, params=like)
    updates, state = flushing(inner)(states[-1], like)
    chex.assert_trees_all_equal_dtypes(updates, like)
    chex.assert_trees_all_equal_dtypes(
        state.inner_opt_state, states[-1].inner_opt_state
    )
    expected = negative(window_of(stream).mean)
    chex.assert_trees_all_close(to_float64(updates), expected, rtol=2.0**-7)


def test_flush_without_parameters_gives_the_dtype_of_the_accumulator():
    stream = [to_bfloat16(grads) for grads in several(2)]
    _, states = accumulate(SGD, 4, stream, params=to_bfloat16(PARAMS))
    updates, _ = flushing(SGD)(states[-1])
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype("float32")}
    expected = negative(window_of(stream).mean)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


# --- moments that come from microbatch_gradients ---------------------------------


def quadratic(params, batch):
    """A loss whose gradients differ from row to row."""
    hidden = jnp.tanh(batch["x"] @ params["body"]["w"].T)
    out = hidden @ params["body"]["b"][:2] + params["gain"]
    return jnp.mean((out - batch["y"]) ** 2)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((count, 3)).astype(np.float32),
        "y": rng.standard_normal(count).astype(np.float32),
    }


def part(batch, start, stop, step=1):
    return jax.tree.map(lambda x: x[start:stop:step], batch)


@full
def test_in_a_call_and_across_calls_is_one_window():
    """Calls of four microbatches and of one, of two rows each, are five of one."""
    batch = rows(10)
    edges = [(0, 8, 4), (8, 10, 1)]
    stream, extras = [], []
    for start, stop, count in edges:
        fn = ost.microbatch_gradients(quadratic, count, mean_square=True)
        value, grads, moments = jax.jit(fn)(PARAMS, part(batch, start, stop))
        stream.append(grads)
        extras.append({"value": value, "moments": moments})
    _, states = watch(2, stream, extras)
    seen = states[-1].inner_opt_state

    gradient = jax.jit(jax.value_and_grad(quadratic))
    singles = [
        # Microbatch i has the rows i, i + K, …
        gradient(PARAMS, part(batch, start + i, stop, count))
        for start, stop, count in edges
        for i in range(count)
    ]
    losses, members = zip(*singles, strict=True)
    window = window_of(members, [2.0] * 5, losses)
    assert int(seen.number) == 5
    assert float(seen.weight) == 10
    chex.assert_trees_all_close(seen.mean, window.mean, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(seen.mean_square, window.mean_square, rtol=1e-5)
    np.testing.assert_allclose(seen.deviation, window.deviation, rtol=1e-5)
    np.testing.assert_allclose(seen.value, window.value, rtol=1e-5)
    separate = [{"weight": 2.0, "value": float(loss)} for loss in losses]
    _, states = watch(5, members, separate)
    expected = states[-1].inner_opt_state
    chex.assert_trees_all_close(seen, expected, rtol=1e-5, atol=1e-6)


@full
def test_a_call_whose_loss_is_nan_counts_for_nothing():
    batch = rows(4)
    fn = jax.jit(ost.microbatch_gradients(quadratic, 2, mean_square=True))
    good = fn(PARAMS, batch)
    bad = fn(PARAMS, {**batch, "x": np.full_like(batch["x"], np.nan)})
    # The moments of the last are in order, and do not count either.
    calls = [good, bad, (np.nan, good[1], good[2])]
    extras = [{"value": value, "moments": moments} for value, _, moments in calls]
    _, states = watch(3, [grads for _, grads, _ in calls], extras)
    assert int(states[-1].rejected_total) == 2
    seen = states[-1].inner_opt_state
    assert int(seen.number) == 2
    assert float(seen.weight) == 4
    chex.assert_trees_all_close(seen.mean, good[1], rtol=ROUNDING)
    np.testing.assert_allclose(seen.deviation, good[2].deviation, rtol=ROUNDING)
    assert float(seen.value) == pytest.approx(float(good[0]), rel=ROUNDING)


def made(**changes):
    """A gradient and its moments."""
    grads = grads_of(0)
    moments = ost.Moments(
        num_microbatches=np.int32(2),
        weight=np.float32(4),
        deviation=np.zeros(3, np.float32),
        mean_square=jax.tree.map(np.square, grads),
    )
    return grads, moments._replace(**changes)


def test_moments_have_a_weight_of_their_own():
    grads, moments = made()
    with pytest.raises(ValueError, match=r"weight= and moments=.*leave weight= out"):
        watch(2, [grads], [{"moments": moments, "weight": 1.0}])


def test_moments_need_a_mean_square_where_one_is_kept():
    grads, moments = made(mean_square=None)
    with pytest.raises(ValueError, match=r"mean_square is None.*mean_square=True") as e:
        watch(2, [grads], [{"moments": moments}])
    assert "accumulate_moments(..., mean_square=False)" in str(e.value)


@pytest.mark.parametrize("has", [True, False])
def test_without_mean_square_moments_may_have_one_or_not(has):
    grads, moments = made() if has else made(mean_square=None)
    tx = ost.accumulate_moments(SGD, 1, mean_square=False)
    (updates,), (state,) = run(tx, [grads], [{"moments": moments}])
    chex.assert_trees_all_equal(updates, negative(grads))
    assert state.moments.mean_square is None
    assert int(state.moments.num_microbatches) == 2


def test_adam_inside_says_what_it_lacks():
    tx = ost.accumulate_moments(FROM_SQUARES, 1, mean_square=False)
    with pytest.raises(ValueError, match="mean_square=True"):
        run(tx, several(1))


# --- arguments -------------------------------------------------------------------


@pytest.mark.parametrize("every_k", [0, -1, 2.5, 2.0])
def test_a_number_of_calls_below_one_or_not_whole_raises(every_k):
    with pytest.raises(ValueError, match=f"every_k={every_k}.*1 takes a step"):
        ost.accumulate_moments(SGD, every_k)


@pytest.mark.parametrize("every_k", ["8", None, True])
def test_what_is_no_number_of_calls_raises(every_k):
    with pytest.raises(TypeError, match=f"every_k={every_k!r}"):
        ost.accumulate_moments(SGD, every_k)


@pytest.mark.parametrize("inner", [optax.adam, 0.1, None], ids=["maker", "rate", "-"])
def test_what_is_no_transformation_raises(inner):
    with pytest.raises(TypeError, match=r"inner must be.*optax\.adamw\(1e-3\)"):
        ost.accumulate_moments(inner, 2)
    state = ost.accumulate_moments(SPY, 2).init(PARAMS)
    with pytest.raises(TypeError, match=r"inner must be.*optax\.adamw\(1e-3\)"):
        ost.flush(inner, state)


def test_an_accumulator_that_is_no_float_raises():
    with pytest.raises(ValueError, match=r"accumulator_dtype=.*jnp\.float32"):
        ost.accumulate_moments(SGD, 2, accumulator_dtype=jnp.int32)


def test_the_state_of_something_else_raises():
    inside = ost.accumulate_moments(SGD, 2)
    around = optax.chain(optax.identity(), inside).init(PARAMS)
    for read in (ost.has_updated, functools.partial(ost.flush, SGD)):
        for state in (optax.adam(0.1).init(PARAMS), around, None):
            with pytest.raises(TypeError, match="state must be the state of accumul"):
                read(state)
    assert not bool(ost.has_updated(around[1]))


# --- what is around and inside ---------------------------------------------------


@full
def test_a_clip_inside_sees_the_mean_and_one_before_it_every_microbatch():
    clip = optax.clip_by_global_norm(1.0)
    small, large = ({**ZEROS, "gain": np.float32(x)} for x in (0.5, 8.5))
    inside = ost.accumulate_moments(optax.chain(clip, SGD), 2)
    before = optax.chain(clip, ost.accumulate_moments(SGD, 2))
    for tx, expected in ((inside, -1.0), (before, -0.75)):
        updates, _ = run(tx, [small, large])
        assert float(updates[1]["gain"]) == pytest.approx(expected, rel=ROUNDING)


@full
def test_a_chain_may_go_on_behind_it():
    nonnegative = optax.keep_params_nonnegative()
    tx = optax.chain(ost.accumulate_moments(SGD, 2), optax.scale(9.0), nonnegative)
    updates, _ = run(tx, several(2))
    mean = window_of(several(2)).mean
    expected = jax.tree.map(lambda p, g: np.maximum(-9 * g, -p), PARAMS, mean)
    assert steps_taken(updates) == [1]
    chex.assert_trees_all_close(updates[1], expected, rtol=1e-5, atol=1e-5)


def kernel_only(tree):
    return {**jax.tree.map(lambda _: False, tree), "body": {"w": True, "b": False}}


def kernel(tree):
    return {"w": tree["body"]["w"]}


@full
def test_masked_around_and_inside_are_the_masked_leaves_alone():
    stream = several(6)
    alone = [kernel(grads) for grads in stream]
    expected, ends = accumulate(FROM_SQUARES, 3, alone, params=kernel(PARAMS))
    around = optax.masked(ost.accumulate_moments(FROM_SQUARES, 3), kernel_only)
    inside = ost.accumulate_moments(optax.masked(FROM_SQUARES, kernel_only), 3)
    found, states = run(around, stream)
    within, _ = run(inside, stream)
    for updates in (found, within):
        shown = [kernel(update) for update in updates]
        chex.assert_trees_all_close(shown, expected, rtol=ROUNDING)
    # What a mask hides passes as it is: the gradient, or the mean of the gradients.
    assert bits([u["body"]["b"] for u in found]) == bits(
        [g["body"]["b"] for g in stream]
    )
    mean = window_of(stream[3:]).mean
    chex.assert_trees_all_close(within[5]["gain"], mean["gain"], rtol=1e-5)
    np.testing.assert_allclose(
        states[-1].inner_state.moments.deviation, ends[-1].moments.deviation, ROUNDING
    )


GROUPS = {
    "slow": ost.safe_adamw(0.01, weight_decay=0.1, second_moment="microbatch"),
    "fast": ost.safe_adamw(0.1, 0.8, 0.9, second_moment="microbatch"),
}


def labels(tree):
    return {**jax.tree.map(lambda _: "slow", tree), "body": {"w": "slow", "b": "fast"}}


def group(tree, name):
    """The leaves of one group, as a tree of their own."""
    if name == "fast":
        return {"body": {"b": tree["body"]["b"]}}
    return {"body": {"w": tree["body"]["w"]}, "gain": tree["gain"]}


@pytest.mark.parametrize("place", ["around", "inside"])
@full
def test_every_group_of_a_partition_is_as_if_it_were_alone(place):
    extras = [{"weight": w} for w in (1.0, 5.0, 2.0, 1.0, 1.0, 3.0)]
    if place == "inside":
        tx = ost.accumulate_moments(optax.partition(GROUPS, labels), 3)
    else:
        groups = {n: ost.accumulate_moments(inner, 3) for n, inner in GROUPS.items()}
        tx = optax.partition(groups, labels)
    found, _ = run(tx, several(6), extras, moving=True)
    for name, inner in GROUPS.items():
        stream = [group(grads, name) for grads in several(6)]
        expected, _ = accumulate(
            inner, 3, stream, extras, params=group(PARAMS, name), moving=True
        )
        shown = [group(updates, name) for updates in found]
        chex.assert_trees_all_close(shown, expected, rtol=ROUNDING, atol=1e-8)


@full
def test_groups_may_accumulate_over_different_numbers_of_calls():
    groups = {
        "slow": ost.accumulate_moments(SGD, 3),
        "fast": ost.accumulate_moments(SGD, 2),
    }
    updates, _ = run(optax.partition(groups, labels), several(6))
    taken = {name: steps_taken([group(u, name) for u in updates]) for name in groups}
    assert taken == {"slow": [2, 5], "fast": [1, 3, 5]}


def test_adam_of_the_microbatch_squares_is_that_of_its_formula():
    """The moments in float64, K microbatches at a time, with unequal weights."""
    b1, b2 = 0.9, 0.99
    stream, weights = several(6), [1.0, 5.0, 2.0, 1.0, 1.0, 3.0]
    stream[1] = spoilt(stream[1], np.nan)
    extras = [{"weight": w} for w in weights]
    updates, _ = accumulate(FROM_SQUARES, 3, stream, extras)
    m, v, count = to_float64(ZEROS), to_float64(ZEROS), 0
    for at, kept in ((2, [0, 2]), (5, [3, 4, 5])):
        window = window_of([stream[i] for i in kept], [weights[i] for i in kept])
        k, count = len(kept), count + len(kept)
        m = jax.tree.map(lambda m, g, d=b1**k: d * m + (1 - d) * g, m, window.mean)
        v = jax.tree.map(
            lambda v, s, d=b2**k: d * v + (1 - d) * s, v, window.mean_square
        )
        units = 1 - b1**count, np.sqrt(1 - b2**count)
        expected = jax.tree.map(
            lambda m, v, u=units: m / u[0] / (np.sqrt(v) / u[1]), m, v
        )
        chex.assert_trees_all_close(updates[at], expected, rtol=ADAM)


@full
def test_hyperparameters_of_inner_can_be_injected():
    inner = optax.inject_hyperparams(optax.sgd)(lambda step: 2.0**-step)
    updates, states = accumulate(inner, 2, [jax.tree.map(np.ones_like, PARAMS)] * 4)
    assert [float(u["gain"]) for u in updates] == [0, -1, 0, -0.5]
    injected = states[-1].inner_opt_state
    assert int(injected.count) == 2
    assert float(injected.hyperparams["learning_rate"]) == 0.5


@full
def test_every_k_can_be_injected():
    def make(every_k):
        return ost.accumulate_moments(SGD, every_k)

    tx = optax.inject_hyperparams(make)(every_k=lambda step: jnp.where(step < 2, 2, 3))
    updates, _ = run(tx, several(5))
    assert steps_taken(updates) == [1, 4]


def test_skipping_inside_sees_the_mean_gradient_and_the_mean_loss():
    inner = ost.skip_spikes(
        SGD,
        grad_norm=ost.thresholds.constant(1e3),
        value=ost.thresholds.constant(5.0),
    )
    losses = [1.0, 8.0, 3.0, 8.0, np.nan, 2.0]  # means 4.5, 5.5 and 2
    extras = [{"value": loss} for loss in losses]
    updates, states = accumulate(inner, 2, several(6), extras)
    skips = [bool(s.inner_opt_state.skipped) for s in states[1::2]]
    assert skips == [False, True, False]
    values = [float(s.inner_opt_state.value) for s in states[1::2]]
    assert values == pytest.approx([4.5, 5.5, 2.0], rel=ROUNDING)
    mean = window_of(several(2)).mean
    norm = np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(mean)))
    assert float(states[1].inner_opt_state.norm) == pytest.approx(norm, rel=1e-5)
    assert is_zero(updates[3])
    assert bool(ost.has_updated(states[3]))
    assert int(states[-1].inner_opt_state.step) == 3


@full
def test_the_guard_around_adam_of_the_microbatch_squares_gets_all_it_needs():
    inner = ost.spike_guard(FROM_SQUARES)
    found, _ = accumulate(inner, 2, several(4), [{"value": 2.0}] * 4)
    expected, _ = accumulate(FROM_SQUARES, 2, several(4))
    chex.assert_trees_all_close(found, expected, rtol=ROUNDING)
    with pytest.raises(ValueError, match="value"):
        accumulate(inner, 2, several(1))


# --- jax -------------------------------------------------------------------------


def faulty_stream(seed, count=9):
    rng = np.random.default_rng(seed)
    faults = rng.choice([1.0, 1.0, np.nan, np.inf], count).astype(np.float32)
    return [spoilt(g, f) for g, f in zip(several(count, seed), faults, strict=True)]


def stack(trees: Sequence):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@full
def test_a_scan_over_calls_under_vmap_equals_loops():
    """Three streams, of which each rejects and steps on its own."""
    tx = ost.accumulate_moments(FROM_SQUARES, lambda step: 2 + step)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    def scan(stream):
        return jax.lax.scan(step, tx.init(PARAMS), stream)

    streams = [faulty_stream(seed) for seed in (1, 2, 3)]
    found = jax.jit(jax.vmap(scan))(stack([stack(stream) for stream in streams]))
    rejected = []
    for member, stream in enumerate(streams):
        updates, states = run(tx, stream)
        shown = jax.tree.map(lambda x, i=member: x[i], found)
        chex.assert_trees_all_close(
            shown, (states[-1], stack(updates)), rtol=ROUNDING, atol=ROUNDING
        )
        rejected.append(int(shown[0].rejected_total))
    assert len(set(rejected)) > 1


@full
def test_orbax_restores_the_middle_of_a_window(tmp_path):
    stream = several(12)
    stream[5] = spoilt(stream[5], np.nan)
    extras = [{"weight": float(1 + i)} for i in range(12)]
    updates, states = accumulate(FROM_SQUARES, 4, stream, extras)
    empty = ost.accumulate_moments(FROM_SQUARES, 4).init(PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[5])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", empty)
    assert bits(restored) == bits(states[5])
    again, later = accumulate(FROM_SQUARES, 4, stream[6:], extras[6:], state=restored)
    assert bits(again) == bits(updates[6:])
    assert bits(later) == bits(states[6:])


# --- flax ------------------------------------------------------------------------


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


def nnx_batches(count):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 3)).astype(np.float32) for _ in range(count)]


def weights_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


def large_batch_weights(tx, batches, size):
    """The weights after steps with batches that are put together."""
    graphdef, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    params = nnx.as_pure(params)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: nnx_loss(nnx.merge(graphdef, p), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(0, len(batches), size):
        params, state = step(params, state, np.concatenate(batches[i : i + size]))
    return params


def nnx_optimizer(tx):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@full
def test_an_nnx_optimizer_takes_it_as_it_is():
    model, optimizer = nnx_optimizer(ost.accumulate_moments(optax.adam(0.1), 8))

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(nnx_loss)(model, x)
        optimizer.update(model, grads, value=loss)
        return ost.has_updated(optimizer.opt_state)

    taken = [bool(step(model, optimizer, x)) for x in nnx_batches(16)]
    assert taken == [i in (7, 15) for i in range(16)]
    assert bool(ost.has_updated(optimizer.opt_state))
    expected = large_batch_weights(optax.adam(0.1), nnx_batches(16), 8)
    chex.assert_trees_all_close(weights_of(model), expected, rtol=1e-4, atol=1e-5)
    assert int(ost.metrics(optimizer)["accumulate/mini_step"]) == 0


@full
def test_an_nnx_optimizer_can_be_split_donated_and_flushed():
    inner = optax.adam(0.1)
    model, optimizer = nnx_optimizer(ost.accumulate_moments(inner, 4))
    graphdef, state = nnx.split((model, optimizer))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(nnx_loss)(model, x)
        optimizer.update(model, grads, loss=loss)
        return nnx.state((model, optimizer))

    for x in nnx_batches(6):
        state = step(state, x)
    model, optimizer = nnx.merge(graphdef, state)
    params = weights_of(model)
    pure = nnx.as_pure(optimizer.opt_state)
    updates, after = flushing(inner)(pure, params)
    found = optax.apply_updates(params, updates)
    expected = large_batch_weights(inner, nnx_batches(6), 4)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert int(after.gradient_step) == 2


# --- several devices -------------------------------------------------------------

EIGHT = {"w": np.zeros((8, 3), np.float32), "v": np.zeros(16, np.float32)}


@functools.cache
def sharded_spy():
    """A step on eight devices; each shows its own counts."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = ost.accumulate_moments(SPY, 2, axis_name="data")
    row, replicated = PartitionSpec("data"), PartitionSpec()
    state = ost.accumulate_moments(SPY, 2).init(EIGHT)
    specs = jax.tree.map(lambda x: row if x.size > 2 else replicated, state)

    def step(grads, state, loss):
        updates, state = tx.update(grads, state, value=loss[0])
        counts = jnp.stack([state.updated, state.rejected_total, state.mini_step])
        return updates, state, counts[None]

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(row, specs, row),
        out_specs=(row, specs, row),
        check_vma=False,  # The loss is each device's own.
    )
    return jax.jit(mapped), state


@pytest.mark.parametrize("fault", ["none", "gradient", "loss"])
@quick_only("gradient")
def test_under_shard_map_all_devices_keep_or_reject_alike(fault):
    step, state = sharded_spy()
    stream, kept = several(4, like=EIGHT), [0, 1, 2, 3]
    for i, grads in enumerate(stream):
        loss = np.ones(8, np.float32)
        if i == 2 and fault != "none":
            kept = [0, 1, 3]
            if fault == "gradient":
                grads["w"][5, 1] = np.nan
            else:
                loss[3] = np.inf
        updates, state, counts = step(grads, state, loss)
        rejected = int(i >= 2 and fault != "none")
        assert counts.tolist() == [[i % 2, rejected, (i + 1) % 2]] * 8
        if i % 2 == 0:
            assert is_zero(updates)
        else:
            members = [stream[j] for j in (i - 1, i) if j in kept]
            assert_given(state.inner_opt_state, window_of(members), sharded=True)


def shard(tree, mesh):
    specs = {0: (), 2: ("data", "model")}
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[x.ndim]))),
        tree,
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@full
def test_sharded_parameters_give_the_same_and_keep_their_sharding(axis_type):
    like = {"w": np.ones((4, 8), np.float32), "s": np.float32(1)}
    stream = several(5, like=like)
    stream[1]["w"][3, 5] = np.inf
    expected, ends = accumulate(FROM_SQUARES, 2, stream, params=like)
    flush = flushing(FROM_SQUARES)
    end = flush(ends[-1], like)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = shard(like, mesh)
        stream = [shard(grads, mesh) for grads in stream]
        found, states = accumulate(FROM_SQUARES, 2, stream, params=sharded)
        flushed = flush(states[-1], sharded)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close((found, states[-1], flushed), (expected, ends[-1], end))
    assert int(states[-1].rejected_total) == 1
    held = states[-1].acc_grads, states[-1].moments.mean_square
    for tree in (*found, *held, flushed[0]):
        for leaf, other in zip(*map(jax.tree.leaves, (tree, sharded)), strict=True):
            assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


# --- memory ----------------------------------------------------------------------


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the XLA of older versions copies more"
)
@pytest.mark.parametrize(
    ("inner", "settings"),
    [
        (optax.sgd(0.1, momentum=0.9), {}),
        (optax.adamw(0.1), {"mean_square": False}),
        (ost.safe_adamw(0.1, second_moment="microbatch"), {}),
    ],
    ids=["momentum", "adamw", "from squares"],
)
@quick_only("adamw")
def test_a_donated_step_needs_no_memory_of_its_own(inner, settings):
    params = {str(i): jnp.ones((128, 256)) for i in range(4)}
    tx = ost.accumulate_moments(inner, 4, **settings)

    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, tx.init(params), params, 1.0
    )
    program = lowered.compile()
    size = sum(x.nbytes for x in params.values())
    assert program.memory_analysis().temp_size_in_bytes < 0.02 * size
    assert not re.findall(r"f32\[128,256\]\S* copy\(", program.as_text())


# --- what a first reader found ------------------------------------------------------


MESH_OF_8 = functools.partial(jax.make_mesh, (8,), ("data",))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@quick_only("AxisType.Explicit")
def test_a_nan_on_any_device_is_seen_on_all(axis_type):
    """The maximum over devices of numbers and NaN is a number on CPU."""
    mesh = MESH_OF_8(axis_types=(axis_type,))
    tx = ost.accumulate_moments(SGD, 1)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("data"))
        params = jax.device_put(jnp.ones(16), place)
        for at in (0, 7, 15):
            grads = jax.device_put(jnp.ones(16).at[at].set(jnp.nan), place)
            updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
            assert int(state.rejected_total) == 1
            assert not np.asarray(updates).any()


@full
def test_under_shard_map_adam_takes_the_step_it_takes_without():
    tx = ost.accumulate_moments(MICROBATCH(), 2)
    sharded = ost.accumulate_moments(MICROBATCH(), 2, axis_name="data")
    stream = [jnp.asarray(np.random.default_rng(i).normal(size=16)) for i in range(4)]
    stream = [x.astype(jnp.float32) for x in stream]
    state, other = tx.init(stream[0]), tx.init(stream[0])
    leaf, scalar = PartitionSpec("data"), PartitionSpec()
    specs = jax.tree.map(lambda x: leaf if x.shape == (16,) else scalar, state)
    step = jax.jit(
        jax.shard_map(
            sharded.update,
            mesh=MESH_OF_8(axis_types=(AxisType.Auto,)),
            in_specs=(leaf, specs),
            out_specs=(leaf, specs),
        )
    )
    for grads in stream:
        expected, state = tx.update(grads, state)
        found, other = step(grads, other)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@full
def test_a_state_that_takes_the_dtype_of_the_gradient_keeps_its_own():
    """A momentum made from bfloat16 parameters, and gradients in float32."""
    params = jnp.ones(3, jnp.bfloat16)
    for wrap in (functools.partial(ost.accumulate_moments, every_k=1), ost.skip_spikes):
        tx = wrap(optax.sgd(0.1, momentum=0.9))
        updates, _ = jax.jit(tx.update)(jnp.ones(3), tx.init(params), params)
        np.testing.assert_allclose(updates, -0.1, rtol=1e-2)


@full
def test_a_clip_in_front_is_known_by_the_norm_of_the_moments():
    """r̂ is what it would be had every microbatch gradient been scaled alike."""
    grads = jnp.array([30.0, 40.0])
    fn = ost.microbatch_gradients(lambda p, x: jnp.mean(x @ p), 2, mean_square=True)
    _, mean, moments = fn(jnp.zeros(2), jnp.stack([grads, grads]))
    clip = optax.clip_by_global_norm(1.0)
    tx = optax.chain(clip, ost.accumulate_moments(MICROBATCH(), 1))
    updates, _ = tx.update(mean, tx.init(mean), moments=moments)
    np.testing.assert_allclose(updates, 1.0, rtol=1e-5)


def test_squares_that_are_not_finite_leave_adam_as_it_was_without_them():
    moments = ost.Moments(
        jnp.int32(2), jnp.float32(2), jnp.zeros(1), jnp.full(2, np.inf)
    )
    tx = MICROBATCH()
    state = tx.init(jnp.ones(2))
    for square in (jnp.inf, jnp.nan):
        given = moments._replace(mean_square=jnp.full(2, square))
        updates, state = tx.update(jnp.ones(2), state, moments=given)
        assert np.isfinite(state.rms).all()
        assert np.isfinite(updates).all()
