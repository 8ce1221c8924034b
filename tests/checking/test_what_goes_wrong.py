"""What the sentences say happens, happens; and does not in the order they ask for."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from tiers import full, quick_only

import optax_stability as ost
from optax_stability._core import _norms
from optax_stability._moments._moments import single

chain = optax.chain
WEIGHTS = {"b": jnp.full(3, 0.5), "w": jnp.full((2, 3), 0.5)}
STEPS = 40


def adam(rate=1e-2, **options):
    return ost.safe_adamw(rate, **options)


def clip(limit=1.0):
    return ost.clip_by_threshold(ost.thresholds.constant(limit))


def guard(*parts):
    return ost.spike_guard(chain(*parts))


def rate(size=1e-2):
    return optax.scale_by_learning_rate(size)


def gradients(steps=STEPS):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda x: 1 + 0.1 * rng.normal(size=x.shape), WEIGHTS)
        for _ in range(steps)
    ]


def with_fault(grads, step, factor):
    """The gradients, one of them multiplied by a number."""
    return [
        jax.tree.map(lambda g: g * factor, each) if i == step else each
        for i, each in enumerate(grads)
    ]


class Ran(NamedTuple):
    """A short run.

    Attributes:
      params: float[steps + 1, 9] – the parameters before the run and after each step.
      state: the last state of the optimizer.
    """

    params: np.ndarray
    state: Any


def run(tx, grads, values=None, params=WEIGHTS, **extra_args):
    """Trains with these gradients; the loss is 1 unless ``values`` are given."""
    values = np.ones(len(grads)) if values is None else values
    if isinstance(tx, optax.GradientTransformation):
        tx = optax.with_extra_args_support(tx)
    update = jax.jit(functools.partial(tx.update, **extra_args))
    state, seen = tx.init(params), [params]
    for g, value in zip(grads, values, strict=True):
        g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = update(g, state, params, value=jnp.float32(value))
        params = optax.apply_updates(params, updates)
        seen.append(params)
    rows = [np.concatenate(jax.tree.leaves(jax.tree.map(np.ravel, p))) for p in seen]
    return Ran(np.array(rows, np.float64), state)


def steps_of(ran):
    """How far each step moved the parameters."""
    return np.abs(np.diff(ran.params, axis=0)).max(axis=1)


def moved_by_nan(tx, at=20, **options):
    """How far a step with a NaN gradient moved the parameters."""
    return steps_of(run(tx, with_fault(gradients(), at, np.nan), **options))[at]


RIGHT = guard(clip(), adam())


# Chains that take a step where a gradient is NaN, and what is right in their place.
MOVES_ON_NAN = {
    "optimizer behind guard": chain(ost.spike_guard(clip()), adam()),
    "optimizer of optax behind guard": chain(
        optax.apply_if_finite(optax.clip_by_global_norm(1.0), 5), optax.adam(1e-2)
    ),
    "decay behind guard": chain(
        guard(ost.scale_by_safe_adam()), optax.add_decayed_weights(0.1), rate()
    ),
    "NaN hidden from guard": chain(clip(), guard(adam())),
    "NaN made zero before guard": chain(optax.zero_nans(), guard(adam())),
    "clip before apply_if_finite": chain(clip(), optax.apply_if_finite(adam(), 5)),
    "schedule_free around guard": contrib.schedule_free(
        guard(optax.sgd(1e-2)), 1e-2, b1=0.9
    ),
}
STAYS_ON_NAN = {
    "guard around all": RIGHT,
    "apply_if_finite around all": optax.apply_if_finite(chain(clip(), adam()), 5),
    "guard around schedule_free": guard(
        contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9)
    ),
    "guard around mechanize": guard(contrib.mechanize(adam())),
    "recipe inside a guard": guard(
        ost.skip_spikes(optax.adaptive_grad_clip(0.1), grad_norm=None), adam()
    ),
}


@pytest.mark.parametrize("name", MOVES_ON_NAN)
@quick_only("optimizer behind guard", "NaN hidden from guard")
def test_a_wrong_order_takes_a_step_on_nan(name):
    assert ost.check(MOVES_ON_NAN[name])
    assert moved_by_nan(MOVES_ON_NAN[name]) > 0


@pytest.mark.parametrize("name", STAYS_ON_NAN)
@quick_only("guard around all")
def test_the_right_order_takes_none(name):
    assert ost.check(STAYS_ON_NAN[name]) == []
    assert moved_by_nan(STAYS_ON_NAN[name]) == 0


@full
def test_mechanize_around_a_guard_ends_in_nan():
    grads = with_fault(gradients(), 20, np.nan)
    inside = contrib.mechanize(ost.skip_spikes(adam()))
    assert np.isnan(run(inside, grads).params[-1]).all()
    assert np.isfinite(run(guard(contrib.mechanize(adam())), grads).params).all()


@full
def test_a_guard_behind_the_optimizer_does_not_keep_nan_out():
    grads = with_fault(gradients(), 20, np.nan)
    behind = chain(optax.scale_by_adam(), guard(rate()))
    assert ost.check(behind)
    assert steps_of(run(behind, grads))[21:].max() == 0  # NaN in its state for good
    assert steps_of(run(guard(optax.scale_by_adam(), rate()), grads))[21:].min() > 0


def norm_spikes(ran):
    return int(ost.metrics(ran.state)["skip/norm_total"])


@full
def test_behind_a_clip_no_norm_is_a_spike():
    spike = with_fault(gradients(), 30, 1e4)
    losses = np.where(np.arange(STEPS) == 30, 3.0, 1.0)
    limits = {"value": None, "confirm": None}
    clipped = optax.clip_by_global_norm(1.0)
    behind = chain(clipped, ost.spike_guard(adam(), **limits))
    around = ost.spike_guard(chain(clipped, adam()), **limits)
    assert ost.check(behind)
    assert ost.check(around) == []
    assert norm_spikes(run(behind, spike, losses)) == 0
    assert norm_spikes(run(around, spike, losses)) == 1


@full
def test_an_inner_guard_counts_nothing():
    grads = with_fault(gradients(), 20, np.nan)
    for outer in (
        optax.apply_if_finite(guard(adam()), 5),
        ost.spike_guard(optax.chain(ost.skip_spikes(adam()))),
    ):
        assert ost.check(outer)
        inner = [
            value
            for key, value in ost.metrics(run(outer, grads).state).items()
            if key.endswith("skip/nan_total")
        ]
        assert int(inner[-1]) == 0


KEEP_NAN = {
    "MultiSteps": optax.MultiSteps(guard(adam()), 4),
    "apply_if_finite": optax.MultiSteps(optax.apply_if_finite(adam(), 100), 4),
    "apply_every": chain(optax.apply_every(4), guard(optax.sgd(1e-2))),
}
LEAVE_NAN_OUT = {
    "accumulate_moments": ost.accumulate_moments(guard(adam()), 4),
    "skip_not_finite": optax.MultiSteps(
        guard(adam()), 4, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("name", KEEP_NAN)
@quick_only("MultiSteps")
def test_one_nan_stays_in_an_accumulator_for_good(name):
    tx = KEEP_NAN[name]
    assert ost.check(tx)
    steps = steps_of(run(tx, with_fault(gradients(), 9, np.nan)))
    assert steps[:8].max() > 0
    assert steps[9:].max() == 0


@pytest.mark.parametrize("name", LEAVE_NAN_OUT)
@full
def test_an_accumulator_that_leaves_nan_out_goes_on(name):
    tx = LEAVE_NAN_OUT[name]
    assert ost.check(tx) == []
    steps = steps_of(run(tx, with_fault(gradients(), 9, np.nan)))
    assert steps[-8:].max() > 0


@full
def test_an_optimizer_behind_an_accumulation_steps_on_zeros():
    behind = chain(ost.accumulate_moments(optax.identity(), 4), adam())
    steps = steps_of(run(behind, gradients()))
    assert (steps[5:8] > 0).all()  # calls that only accumulate
    around = ost.accumulate_moments(adam(), 4)
    assert (steps_of(run(around, gradients()))[4:7] == 0).all()


@full
def test_an_accumulation_behind_an_optimizer_does_not_spare_it_a_microbatch():
    behind = chain(ost.scale_by_safe_adam(), ost.accumulate_moments(rate(), 4))
    assert ost.check(behind)
    assert int(run(behind, gradients()).state[0].step) == STEPS


@full
def test_a_window_inside_a_guard_waits_for_what_is_skipped():
    grads = with_fault(gradients(8), 2, np.nan)
    inside = guard(ost.accumulate_moments(adam(), 4))
    around = ost.accumulate_moments(guard(adam()), 4)
    assert np.flatnonzero(steps_of(run(inside, grads))).tolist() == [4]
    assert np.flatnonzero(steps_of(run(around, grads))).tolist() == [3, 7]


@full
def test_nested_windows_multiply():
    nested = ost.accumulate_moments(ost.accumulate_moments(adam(), 2), 3)
    moved = np.flatnonzero(steps_of(run(nested, gradients(12))))
    assert moved.tolist() == [5, 11]


@full
def test_a_history_inside_a_guard_has_no_row_of_a_skipped_step():
    grads = with_fault(gradients(), 20, np.nan)
    inside = ost.history(run(guard(ost.record_history(adam())), grads).state)
    around = ost.history(run(ost.record_history(guard(adam())), grads).state)
    assert len(inside["step"]) == STEPS - 1
    assert "skip/skipped" not in inside
    assert len(around["step"]) == STEPS
    assert around["skip/skipped"][20]


@full
def test_a_history_beside_a_guard_does_not_know_it():
    beside = chain(ost.record_history(ost.record("grad")), guard(adam()))
    assert "skip/skipped" not in ost.history(run(beside, gradients()).state)


@full
def test_a_history_around_an_accumulation_has_a_row_for_each_microbatch():
    around = ost.record_history(ost.accumulate_moments(adam(), 4))
    inside = ost.accumulate_moments(ost.record_history(adam()), 4)
    for tx, rows in ((around, STEPS), (inside, STEPS // 4)):
        assert len(ost.history(run(tx, gradients()).state)["step"]) == rows


FROZEN = {"b": True, "w": False}


def parted(tx):
    return optax.partition(
        {True: optax.set_to_zero(), False: tx}, lambda params: FROZEN
    )


@full
def test_a_nan_in_a_frozen_leaf_stops_training_unless_it_is_zeroed_first():
    grads = [g | {"b": np.full(3, np.nan)} for g in gradients()]
    stopped = guard(parted(adam()))
    assert ost.check(stopped)
    assert steps_of(run(stopped, grads)).max() == 0
    for tx in (
        chain(optax.freeze(FROZEN), guard(parted(adam()))),
        parted(guard(adam())),
    ):
        assert ost.check(tx) == []
        assert steps_of(run(tx, grads)).min() > 0


@full
def test_what_is_not_frozen_in_these_parameters_is_no_fault():
    stopped = guard(parted(adam()))
    everything = optax.partition(
        {True: optax.set_to_zero(), False: adam()}, lambda params: False
    )
    assert ost.check(stopped, WEIGHTS) == ost.check(stopped) != []
    assert ost.check(guard(everything), WEIGHTS) == []


@full
def test_going_back_is_changed_by_what_stands_behind_a_branch():
    """Four steps on other data open a branch; the old data take it back."""
    losses = np.where((np.arange(STEPS) >= 30) & (np.arange(STEPS) < 34), 9.0, 1.0)

    def distance_after_going_back(tx):
        ran = run(tx, gradients(), losses)
        assert ost.metrics(ran.state)["branch/rollbacks"] == 1
        before = ran.params[30]
        return np.abs(ran.params[33:] - before).max(axis=1).min()

    inside = ost.branch_on_spike(chain(ost.scale_by_safe_adam(), rate()))
    behind = chain(ost.branch_on_spike(ost.scale_by_safe_adam()), rate())
    assert distance_after_going_back(inside) < 1e-6
    assert distance_after_going_back(behind) > 1e-3


def test_a_clip_behind_adam_lets_a_spike_into_its_state():
    grads = with_fault(gradients(), 20, 1e4)

    def share_after(tx):
        """The step ten steps after the spike, of that before it."""
        steps = steps_of(run(tx, grads))
        return steps[30] / steps[19]

    assert share_after(chain(adam(), clip())) < 0.3
    assert share_after(chain(clip(), adam())) > 0.9


def test_a_clip_behind_muon_limits_what_does_not_depend_on_the_gradient():
    """A matrix of rank 3 alone: its update has the norm √3 whatever the gradient."""
    tx = contrib.scale_by_muon()
    w = jnp.eye(3, 4)
    for size in (1e-3, 1.0, 1e3):
        updates, _ = tx.update(size * (1 + w), tx.init(w), w)
        updates, _ = tx.update(size * (1 - w), tx.init(w), w)
        assert 1 < float(jnp.linalg.norm(updates)) < 3


@full
def test_a_second_clip_that_is_not_lower_never_clips():
    once = optax.clip_by_global_norm(1.0)
    twice = chain(once, optax.clip_by_global_norm(2.0))
    grads = with_fault(gradients(), 20, 1e4)
    first = run(chain(once, adam()), grads).params
    np.testing.assert_array_equal(run(chain(twice, adam()), grads).params, first)


@full
def test_a_learning_rate_in_front_of_adam_has_no_effect_but_its_sign():
    small, large = (chain(rate(r), ost.scale_by_safe_adam()) for r in (1e-6, 1e-1))
    steps = steps_of(run(small, gradients()))
    np.testing.assert_allclose(steps, steps_of(run(large, gradients())), rtol=1e-4)
    assert steps.min() > 0.5


def test_two_learning_rates_go_up_the_gradient():
    up = run(chain(adam(), rate()), gradients())
    down = run(adam(), gradients())
    assert up.params[-1].min() > WEIGHTS["b"][0] > down.params[-1].max()


def test_weights_grow_where_decay_stands_behind_the_learning_rate():
    grads = [jax.tree.map(np.zeros_like, WEIGHTS)] * 10
    decay = optax.add_decayed_weights(0.1)
    behind = run(chain(ost.scale_by_safe_adam(), rate(0.1), decay), grads)
    front = run(chain(ost.scale_by_safe_adam(), decay, rate(0.1)), grads)
    assert behind.params[-1].min() > 0.5 > front.params[-1].max()


@full
def test_decay_in_front_of_adam_is_divided_by_the_size_of_the_gradient():
    decay = optax.add_decayed_weights(0.1)

    def decayed(size, make):
        """What the decay changes, for gradients of a size with changing sign."""
        ones = jax.tree.map(lambda x: size * np.ones(x.shape), WEIGHTS)
        minus = jax.tree.map(np.negative, ones)
        grads = [ones, minus] * (STEPS // 2)
        ends = [run(make(each), grads).params[-1] for each in (optax.identity(), decay)]
        return np.abs(ends[0] - ends[1]).max()

    def front(d):
        return chain(d, ost.scale_by_safe_adam(), rate())

    def behind(d):
        return chain(ost.scale_by_safe_adam(), d, rate())

    assert decayed(100.0, front) < 0.05 * decayed(1.0, front)
    assert decayed(100.0, behind) == pytest.approx(decayed(1.0, behind), rel=0.05)


@full
def test_scaling_a_leaf_in_front_of_adam_without_eps_does_nothing():
    shrink = ost.scale_gradients({"w": 0.125})
    plain = run(adam(), gradients()).params
    np.testing.assert_array_equal(run(chain(shrink, adam()), gradients()).params, plain)
    clipped = run(chain(shrink, clip(), adam()), with_fault(gradients(), 5, 9.0)).params
    without = run(chain(clip(), adam()), with_fault(gradients(), 5, 9.0)).params
    assert np.abs(clipped - without).max() > 1e-6


def noisy_moments(grads):
    """Moments of two microbatches that are apart, as the library makes them."""
    moments = single(grads, 0.0, 2.0, mean_square=True).moments
    return moments._replace(
        num_microbatches=jnp.int32(2),
        deviation=jnp.ones_like(moments.deviation),
        norm=_norms.leaf_norms(grads),
    )


@full
def test_a_noise_scale_in_front_of_adam_has_next_to_no_effect():
    grads = jax.tree.map(jnp.asarray, gradients())
    moments = noisy_moments(grads[0])
    scale = ost.scale_by_noise_scale(0.01)
    step = adam(b2=0.9)  # which forgets the first steps within the run
    front = steps_of(run(chain(scale, step), grads, moments=moments))
    behind = steps_of(run(chain(step, scale), grads, moments=moments))
    plain = steps_of(run(step, grads))
    # Where the scale has come down it is constant, and Adam undoes it.
    assert behind[-1] < 0.2 * plain[-1]
    assert front[-1] > 0.5 * plain[-1]


@full
def test_an_optimizer_that_is_off_hands_on_the_gradient_itself():
    grads = jax.tree.map(jnp.asarray, gradients())
    off = ost.when_noisy(adam(), above=1e9)
    ran = run(off, grads, moments=noisy_moments(grads[0]))
    assert steps_of(ran).min() > 0.5  # and uphill
    assert ran.params[-1].min() > WEIGHTS["b"][0]


@full
def test_a_restart_restarts_the_schedule_too():
    schedule = optax.linear_schedule(0.0, 1.0, STEPS)
    whole = ost.restart_moments(ost.safe_adamw(schedule), every=30)
    only = chain(
        ost.restart_moments(ost.scale_by_safe_adam(), every=30),
        optax.scale_by_learning_rate(schedule),
    )
    assert steps_of(run(whole, gradients()))[-1] < 0.5
    assert steps_of(run(only, gradients()))[-1] > 0.5


@full
def test_a_wrapper_without_extra_arguments_keeps_the_loss_from_a_guard():
    inside = contrib.split_real_and_imaginary(guard(adam()))
    with pytest.raises(ValueError, match="value="):
        run(chain(inside), gradients())
    outside = guard(contrib.split_real_and_imaginary(adam()))
    assert steps_of(run(outside, gradients())).min() > 0


def test_multi_steps_hands_on_the_moments_of_the_last_call():
    """Four of two microbatches each are eight, and it says two."""

    def update(updates, state, params=None, *, moments, **extra_args):
        return updates, moments.num_microbatches

    notes = optax.GradientTransformationExtraArgs(lambda _: jnp.int32(0), update)
    moments = noisy_moments(WEIGHTS)
    grads = gradients(4)
    by_optax = run(optax.MultiSteps(notes, 4), grads, moments=moments)
    ours = run(
        ost.accumulate_moments(notes, 4, mean_square=False), grads, moments=moments
    )
    counted = by_optax.state.inner_opt_state, ours.state.inner_opt_state
    assert [int(each) for each in counted] == [2, 8]


def test_without_a_mean_square_microbatch_adam_refuses():
    inner = ost.safe_adamw(1e-2, second_moment="microbatch")
    with pytest.raises(ValueError, match="mean_square"):
        run(ost.accumulate_moments(inner, 2, mean_square=False), gradients(2))


@full
def test_a_record_at_the_wrong_place_measures_something_else():
    behind = chain(clip(), ost.record("grad"), adam())
    assert ost.metrics(run(behind, gradients()).state)["grad/norm"] <= 1.00001
    front = chain(ost.scale_by_safe_adam(), ost.record("update"), rate(1e-4))
    assert ost.metrics(run(front, gradients()).state)["update/norm"] > 0.1


def test_two_records_of_one_name_are_found_by_their_place_only():
    twice = chain(ost.record("grad"), ost.record("grad"), adam())
    assert "grad/norm" not in ost.metrics(twice.init(WEIGHTS))


@full
def test_the_noise_scale_may_stand_behind_a_clip_but_not_its_pairs():
    """With microbatches the moments hold the norm of before the clip."""
    grads = jax.tree.map(jnp.asarray, gradients())
    gradients_of = ost.microbatch_gradients(lambda p, x: jnp.sum(x * p["b"]), 4)
    batch = jnp.arange(24.0).reshape(8, 3)
    _, mean, moments = gradients_of({"b": WEIGHTS["b"]}, batch)

    def scale(*parts):
        state = run(
            chain(*parts), [mean] * 5, params={"b": WEIGHTS["b"]}, moments=moments
        ).state
        return float(ost.noise_scale(state).trace), float(
            ost.metrics(state)["noise_scale/grad_sq"]
        )

    estimate = ost.estimate_noise_scale(scope="global")
    assert scale(clip(), estimate) == scale(estimate, clip())

    def of_pairs(*parts):
        alone = single(grads[0], 0.0, 1.0, mean_square=False).moments
        state = run(chain(*parts), grads, moments=alone).state
        return float(ost.metrics(state)["noise_scale/grad_sq"])

    pairs = ost.estimate_noise_scale(scope="global", difference=True)
    assert of_pairs(clip(), pairs) < 0.5 * of_pairs(pairs, clip())


def test_one_vector_has_no_leaves():
    tx = optax.flatten(ost.clip_by_leaf_history())
    assert tx.init(WEIGHTS).leaf_norm.shape == (1,)
