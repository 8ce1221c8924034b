"""``max_share``: a bound on the share of finite steps skipped, on any stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full

import optax_stability as ost
from optax_stability import thresholds

STEPS, BUDGET = 3000, 4
PARAMS = {"w": jnp.zeros(())}
FACTORIES = {
    "skip_spikes": ost.skip_spikes,
    "spike_guard": ost.spike_guard,
    "branch_on_spike": ost.branch_on_spike,
}


# --- Adversaries: (state, random number, step) → whether the next is abnormal. --------


def as_soon_as_a_skip_is_left(skip, chance, step):
    del chance, step
    return skip.left >= 1


def when_the_bucket_is_full(skip, chance, step):
    """Saves up, and then spends everything at once."""
    del chance
    return (skip.left >= BUDGET) | ((step % 500 > 400) & (skip.left >= 1))


def one_in_twenty(skip, chance, step):
    del skip, chance
    return step % 20 == 19


def bursts(skip, chance, step):
    del skip, chance
    return step % 60 > 50


def at_random(skip, chance, step):
    del skip, step
    return chance < 0.3


def nearly_always(skip, chance, step):
    del skip, step
    return chance < 0.95


ADVERSARIES = (
    as_soon_as_a_skip_is_left,
    when_the_bucket_is_full,
    one_in_twenty,
    bursts,
    at_random,
    nearly_always,
)


@functools.cache
def fought(factory, adversary, share):
    """(skipped, declined_total) of each step against an adversary."""
    options = {"value": thresholds.constant(5.0), "confirm": None}
    tx = FACTORIES[factory](
        optax.identity(), grad_norm=None, budget=BUDGET, max_share=share, **options
    )

    def step(state, data):
        chance, i = data
        skip = state.skip if factory == "branch_on_spike" else state
        loss = jnp.where(adversary(skip, chance, i), 9.0, 1.0)
        grads = {"w": jnp.ones(())}
        _, state = tx.update(grads, state, PARAMS, value=loss)
        skip = state.skip if factory == "branch_on_spike" else state
        return state, (skip.skipped, skip.declined_total, skip.left)

    data = jax.random.uniform(jax.random.key(0), (STEPS,)), jnp.arange(STEPS)
    _, found = jax.jit(lambda: jax.lax.scan(step, tx.init(PARAMS), data))()
    return [np.asarray(each) for each in found]


def check_bounds(skipped, share):
    total = np.cumsum([0, *skipped])
    steps = np.arange(len(total))
    assert (total <= share * steps + 1e-9).all()
    for length in range(1, len(total), 7):
        lost = total[length:] - total[:-length]
        assert lost.max() <= BUDGET + share * length


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda each: each.__name__)
def test_no_stream_loses_more_than_the_share(adversary):
    skipped, _, _ = fought("spike_guard", adversary, 0.01)
    check_bounds(skipped, 0.01)


@full
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("share", [0.001, 0.03, 0.3, 0.5])
@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda each: each.__name__)
def test_no_stream_loses_more_than_any_share(factory, adversary, share):
    skipped, _, _ = fought(factory, adversary, share)
    check_bounds(skipped, share)


def test_what_was_saved_up_can_be_spent():
    """The bound is met: a rule that never skips would hold it as well."""
    skipped, _, left = fought("spike_guard", as_soon_as_a_skip_is_left, 0.01)
    assert skipped.sum() == pytest.approx(0.01 * STEPS, abs=1)
    skipped, _, left = fought("spike_guard", when_the_bucket_is_full, 0.01)
    assert left.max() == BUDGET
    assert skipped.sum() > 0.8 * 0.01 * STEPS - BUDGET


def test_spikes_that_no_skip_was_left_for_are_counted():
    skipped, declined, _ = fought("spike_guard", one_in_twenty, 0.01)
    assert declined[-1] + skipped.sum() == STEPS // 20


def test_a_long_quiet_run_gives_the_first_spike_a_skip():
    tx = ost.skip_spikes(
        optax.identity(), grad_norm=thresholds.constant(5.0), max_share=0.001
    )
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for step in range(1003):
        norm = 9.0 if step in (500, 1001, 1002) else 1.0
        _, state = update({"w": jnp.full((), norm)}, state, PARAMS)
        if step == 500:
            assert not state.skipped
            assert state.declined_total == 1
        if step == 1001:
            assert state.skipped
            assert state.left == 0
    assert not state.skipped


def test_steps_that_are_not_finite_cost_nothing_and_are_skipped_all_the_same():
    tx = ost.skip_spikes(optax.identity(), max_share=0.001)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update({"w": jnp.full((), jnp.nan)}, state, PARAMS)
        assert state.skipped
        assert (state.credit, state.declined_total) == (0, 0)


@full
@pytest.mark.parametrize("factory", FACTORIES)
def test_without_a_share_the_bucket_is_that_of_the_budget(factory):
    tx = FACTORIES[factory](optax.identity(), budget=7)
    state = tx.init(PARAMS)
    skip = state.skip if factory == "branch_on_spike" else state
    assert (int(skip.credit), int(skip.left)) == (49, 7)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("share", [0.0, -0.1, 1e-6, 0.6, 1])
def test_a_share_that_is_out_of_range_raises(factory, share):
    with pytest.raises(ValueError, match=rf"max_share={share}.*0\.001 skips one step"):
        FACTORIES[factory](optax.identity(), max_share=share)


@full
def test_the_share_can_be_injected():
    made = functools.partial(ost.skip_spikes, optax.identity())
    tx = optax.inject_hyperparams(lambda max_share: made(max_share=max_share))(0.01)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)({"w": jnp.ones(())}, state, PARAMS)
    assert int(state.inner_state.credit) == 1
