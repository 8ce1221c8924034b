"""docs/ours_or_optax.md, line by line, against the optax that is installed."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_stability as ost
from optax_stability import thresholds

PAGE = Path(__file__).parents[1] / "docs" / "ours_or_optax.md"
PARAMS = {"w": jnp.ones(4)}
GRADS = {"w": jnp.array([0.3, -0.2, 0.1, 0.4])}
NAN = {"w": jnp.full(4, jnp.nan)}


def run(tx, trees, losses=None):
    """The updates of each call, and the last state."""
    state, step, out = tx.init(PARAMS), jax.jit(tx.update), []
    for i, grads in enumerate(trees):
        extra = {} if losses is None else {"value": losses[i]}
        updates, state = step(grads, state, PARAMS, **extra)
        out.append(updates)
    return out, state


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# --- MultiSteps, skip_not_finite ---------------------------------------------------


def test_a_nan_stays_in_multi_steps_for_good():
    calls = [GRADS, NAN, *[GRADS] * 6]
    theirs, _ = run(optax.MultiSteps(optax.sgd(1.0), 2), calls)
    assert not any(is_finite(updates) for updates in theirs[1:])
    ours, state = run(ost.accumulate_moments(optax.sgd(1.0), 2), calls)
    assert all(is_finite(updates) for updates in ours)
    np.testing.assert_allclose(ours[1]["w"], -GRADS["w"], rtol=1e-6)
    assert ost.metrics(state)["accumulate/rejected_total"] == 1


def told():
    """A transformation whose state is the loss that it was given, −1 for none."""

    def update(updates, state, params=None, *, value=None, **extra_args):
        del state, params, extra_args
        return updates, jnp.float32(-1.0 if value is None else value)

    return optax.GradientTransformationExtraArgs(lambda p: jnp.float32(-1.0), update)


def test_multi_steps_hands_on_the_last_loss_and_none_inside_a_chain():
    losses = [jnp.float32(1.0), jnp.float32(3.0)]
    _, state = run(optax.MultiSteps(told(), 2), [GRADS] * 2, losses)
    assert state.inner_opt_state == 3.0
    in_chain = optax.chain(optax.MultiSteps(told(), 2).gradient_transformation())
    _, state = run(in_chain, [GRADS] * 2, losses)
    assert state[0].inner_opt_state == -1.0
    _, state = run(ost.accumulate_moments(told(), 2), [GRADS] * 2, losses)
    assert state.inner_opt_state == 2.0


def test_skip_not_finite_waits_for_one_microbatch_more():
    tx = optax.MultiSteps(
        optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite
    )
    theirs, _ = run(tx, [GRADS, NAN, GRADS])
    assert [bool(jnp.any(each["w"] != 0)) for each in theirs] == [False, False, True]
    ours, state = run(ost.accumulate_moments(optax.sgd(1.0), 2), [GRADS, NAN, GRADS])
    assert [bool(jnp.any(each["w"] != 0)) for each in ours] == [False, True, False]
    assert ost.metrics(state)["accumulate/rejected_total"] == 1


# --- microbatch --------------------------------------------------------------------


def test_one_bad_microbatch_costs_optax_the_sum():
    x = jnp.arange(8.0).reshape(8, 1).at[0].set(jnp.nan)

    def loss_fn(params, x):
        return jnp.mean(jnp.sum(x * params["w"], axis=1))

    theirs = optax.microbatch(
        jax.grad(loss_fn),
        argnums=1,
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )(PARAMS, x)
    assert not is_finite(theirs)
    _, ours, moments = ost.microbatch_gradients(loss_fn, 4)(PARAMS, x)
    assert is_finite(ours)
    assert moments.num_microbatches == 3
    assert moments.deviation.shape == (1,)


# --- apply_if_finite ---------------------------------------------------------------


def test_apply_if_finite_gives_up_and_ours_never_does():
    calls = [NAN] * 8
    theirs, _ = run(optax.apply_if_finite(optax.sgd(1.0), 5), calls)
    assert [is_finite(each) for each in theirs] == [True] * 5 + [False] * 3
    ours, state = run(ost.skip_spikes(optax.sgd(1.0), max_consecutive=5), calls)
    assert all(is_finite(each) for each in ours)
    assert state.total == 8


# --- clips -------------------------------------------------------------------------


def test_below_the_limit_both_clips_are_the_identity():
    ours = ost.clip_by_threshold(thresholds.constant(1.0))
    for tx in (optax.clip_by_global_norm(1.0), ours):
        (updates,), _ = run(tx, [GRADS])
        np.testing.assert_array_equal(updates["w"], GRADS["w"])


def test_a_norm_that_overflows_is_zero_in_optax():
    huge = {"w": jnp.full(4, 1e30)}
    (theirs,), _ = run(optax.clip_by_global_norm(1.0), [huge])
    np.testing.assert_array_equal(theirs["w"], 0.0)
    (ours,), _ = run(ost.clip_by_threshold(thresholds.constant(1.0)), [huge])
    np.testing.assert_allclose(ours["w"], 0.5, rtol=1e-6)


def test_clip_by_zscore_finds_its_limit():
    spike = optax.tree.scale(1e3, GRADS)
    updates, _ = run(ost.clip_by_zscore(), [GRADS] * 40 + [spike])
    assert optax.tree.norm(updates[-1]) < 2 * optax.tree.norm(GRADS)


def test_the_adaptive_clip_goes_by_the_weights_and_ours_by_the_past():
    large = optax.tree.scale(10.0, GRADS)
    (theirs,), _ = run(optax.adaptive_grad_clip(0.01), [large])
    assert optax.tree.norm(theirs) < optax.tree.norm(large)
    # The first gradient of a run has no past.
    (ours,), _ = run(ost.clip_by_leaf_history(), [large])
    np.testing.assert_array_equal(ours["w"], large["w"])
    (theirs,), _ = run(optax.adaptive_grad_clip(0.01), [NAN])
    assert not is_finite(theirs)


# --- measurements ------------------------------------------------------------------


def scan(tx):
    def step(state, grads):
        return tx.update(grads, state, PARAMS)[1], None

    return jax.lax.scan(
        step, tx.init(PARAMS), optax.tree.scale(jnp.ones((3, 1)), GRADS)
    )


def test_the_state_of_monitor_cannot_be_scanned_and_ours_can():
    with pytest.raises(TypeError, match="carry"):
        scan(optax.monitor({"norm": optax.tree.norm}))
    scan(optax.snapshot("norm", optax.tree.norm))
    state, _ = scan(ost.record_history(ost.record("grad"), length=3))
    norm = float(optax.tree.norm(GRADS))
    assert ost.metrics(state)["grad/norm"] == pytest.approx(norm)
    np.testing.assert_allclose(ost.history(state)["grad/norm"], norm, rtol=1e-6)


# --- reduce_on_plateau ---------------------------------------------------------------


@pytest.mark.parametrize("guarded", [False, True])
def test_a_nan_loss_counts_as_a_plateau_unless_a_guard_is_around(guarded):
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=10))
    tx = ost.spike_guard(tx) if guarded else tx
    losses = [jnp.float32(x) for x in (2.0, np.nan)]
    _, state = run(tx, [GRADS, NAN], losses)
    plateau = (state.inner_state if guarded else state)[1]
    assert plateau.plateau_count == (0 if guarded else 1)


# --- Adam ----------------------------------------------------------------------------


def test_without_eps_adam_is_the_same_and_states_convert():
    tx = optax.scale_by_adam(eps=0.0)
    theirs, state = run(tx, [GRADS] * 3)
    ours, _ = run(ost.scale_by_safe_adam(), [GRADS] * 3)
    # optax rounds 1 − b2ᵗ, here 0.001, in float32.
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4)
    back = ost.to_optax_adam_state(ost.from_optax_adam_state(state))
    chex.assert_trees_all_close(back, state, rtol=1e-6)


def test_small_gradients_give_nothing_in_optax():
    small = optax.tree.scale(1e-20, GRADS)
    (theirs,), _ = run(optax.scale_by_adam(), [small])
    (ours,), _ = run(ost.scale_by_safe_adam(), [small])
    assert float(jnp.max(jnp.abs(theirs["w"]))) < 1e-10
    np.testing.assert_allclose(jnp.abs(ours["w"]), 1.0, rtol=1e-5)


# --- inject_hyperparams --------------------------------------------------------------


def test_a_schedule_counts_skipped_steps_around_the_guard_and_not_inside():
    schedule = optax.schedules.linear_schedule(1.0, 0.0, 10)

    def guard(learning_rate):
        return ost.spike_guard(optax.sgd(learning_rate), loss=False)

    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    calls = [GRADS, NAN, GRADS]
    _, around = run(optax.inject_hyperparams(guard)(learning_rate=schedule), calls)
    _, inside = run(ost.spike_guard(injected, loss=False), calls)
    assert around.hyperparams["learning_rate"] == pytest.approx(0.8)
    assert inside.inner_state.hyperparams["learning_rate"] == pytest.approx(0.9)


# --- the page ------------------------------------------------------------------------


def test_every_overlap_has_a_line_and_every_name_exists():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    theirs = " ".join(row.split("|")[1] for row in rows)
    expected = [
        *("MultiSteps", "microbatch", "apply_if_finite", "skip_not_finite"),
        *("clip_by_global_norm", "adaptive_grad_clip", "monitor", "snapshot"),
        *("contrib.reduce_on_plateau", "scale_by_adam", "inject_hyperparams"),
    ]
    assert re.findall("`([^`]*)`", theirs) == expected
    for name in expected:
        holder = optax.contrib if name.startswith("contrib.") else optax
        assert hasattr(holder, name.rpartition(".")[2])
    ours = " ".join(row.split("|")[2] for row in rows)
    for name in re.findall(r"`(\w+)", ours):
        assert name == "recipes" or hasattr(ost, name), name
