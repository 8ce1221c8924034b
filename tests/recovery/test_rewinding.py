"""When to go back, where to, and past which batches."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_stability as ost

EARLIER = 20  # Steps from one checkpoint to the next, in the simulated runs.


def watch(losses, policy, start=1):
    """The decisions on losses that are a function of the step alone."""
    return [policy.update(t, {"loss": x}) for t, x in enumerate(losses, start=start)]


def simulate(loss_of, policy, steps, calls=5000):
    """A loop as in the docstring; the loss depends on step and batch.

    Returns:
      The batches that each step of the run that counts was taken on, the rewinds as
      (step, restored, next batch), and whether it came to the end.
    """
    step = ahead = 0
    taken, rewinds = {}, []
    while step < steps and calls:
        step, calls = step + 1, calls - 1
        taken[step] = step + ahead
        decision = policy.update(step, {"loss": loss_of(step, step + ahead)})
        if decision.action == "stop":
            return taken, rewinds, "stop"
        if decision.action == "rewind":
            restored = decision.restore_step // EARLIER * EARLIER
            ahead += decision.skip_until - (restored + 1)
            rewinds.append((step, restored, restored + 1 + ahead))
            step = restored
    return (
        {t: taken[t] for t in range(1, step + 1)},
        rewinds,
        "end" if calls else "lost",
    )


def falling(step, noise=0.0):
    return 2.0 + 3.0 * math.exp(-step / 50) + noise


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_loss_that_falls_is_left_alone(seed):
    noise = 0.15 * np.random.default_rng(seed).standard_normal(3000)
    losses = [falling(t, x) for t, x in enumerate(noise)]
    assert {each.action for each in watch(losses, ost.RewindPolicy())} == {"continue"}


@pytest.mark.parametrize("patience", [2, 9, 16])
@pytest.mark.parametrize("bad", [100.0, math.nan, math.inf])
def test_what_is_over_soon_never_triggers(patience, bad):
    few = (patience - 1) // 2
    losses = [2.0] * 100 + ([bad] * few + [2.0] * patience) * 5
    decisions = watch(losses, ost.RewindPolicy(patience=patience))
    assert {each.action for each in decisions} == {"continue"}


@pytest.mark.parametrize("bad", [2.7, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patience", [2, 9, 16])
def test_a_rise_for_good_is_found_within_the_patience(patience, bad):
    policy = ost.RewindPolicy(steps_back=30, patience=patience)
    decisions = watch([2.0] * 200 + [bad] * patience, policy)
    found = next(t for t, x in enumerate(decisions, 1) if x.action == "rewind")
    assert 200 + patience / 2 <= found <= 200 + patience
    decision = decisions[found - 1]
    # Onset is step 201: the state before it is that of step 200.
    assert decision.restore_step == 200 - 30
    assert decision.skip_until == 170 + 1 + 200
    assert "loss is" in decision.reason
    assert "since step 201" in decision.reason


def test_a_small_rise_is_left_alone():
    decisions = watch([2.0] * 200 + [2.49] * 100, ost.RewindPolicy())
    assert {each.action for each in decisions} == {"continue"}


def test_a_slow_rise_is_followed():
    losses = 2.0 + np.arange(20_000) * 4e-4  # 0.4 in the thousand steps of memory.
    decisions = watch(losses, ost.RewindPolicy())
    assert {each.action for each in decisions} == {"continue"}
    faster = watch(2.0 + np.arange(2000) * 6e-4, ost.RewindPolicy())
    assert "rewind" in {each.action for each in faster}


def test_nan_from_the_first_step_is_found():
    actions = [each.action for each in watch([math.nan] * 30, ost.RewindPolicy())]
    # More than half of sixteen; one rewind to step 0, and then on from there.
    assert actions.index("rewind") == 8


def test_the_batches_that_did_the_harm_are_passed_over():
    def loss_of(step, batch):
        return 9.0 if 300 <= batch < 360 else falling(step)

    policy = ost.RewindPolicy(steps_back=50, skip_batches=150)
    taken, rewinds, end = simulate(loss_of, policy, steps=600)
    assert end == "end"
    ((seen, restored, _),) = rewinds
    assert 300 < seen <= 316
    assert restored == 240  # The newest checkpoint not after 299 - 50.
    assert not {batch for batch in taken.values() if 240 < batch <= seen}
    batches = list(taken.values())
    assert batches == sorted(set(batches))
    assert taken[241] == 249 + 1 + 150


def test_however_few_are_left_out_what_was_seen_is():
    policy = ost.RewindPolicy(steps_back=100, skip_batches=1)
    _, ((seen, restored, following),), end = simulate(
        lambda step, batch: 9.0 if 300 <= batch < 316 else 2.0, policy, steps=400
    )
    assert (restored, end) == (180, "end")
    assert following == seen + 1


def test_after_the_last_attempt_it_is_stop_and_stays_so():
    policy = ost.RewindPolicy(max_rewinds=2)
    taken, rewinds, end = simulate(
        lambda step, batch: 2.0 if step < 300 else 9.0, policy, steps=10_000
    )
    del taken
    assert (len(rewinds), end) == (2, "stop")
    decision = policy.update(350, {"loss": 9.0})
    assert decision.action == "stop"
    assert decision.reason.endswith("after 2 rewinds")


def test_no_rewinds_at_all():
    decisions = watch([2.0] * 50 + [9.0] * 16, ost.RewindPolicy(max_rewinds=0))
    assert decisions[-1].action == "stop"


def test_a_stretch_that_was_passed_gives_the_attempts_back():
    bad = [range(k, k + 40) for k in (1000, 3000, 5000, 7000)]

    def loss_of(step, batch):
        return 9.0 if any(batch in each for each in bad) else 2.0

    policy = ost.RewindPolicy(max_rewinds=1)
    _, rewinds, end = simulate(loss_of, policy, steps=8000, calls=20_000)
    assert (len(rewinds), end) == (4, "end")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1.0, 2.0, 5.0, math.nan])),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_every_loop_ends_and_no_state_decides_otherwise(pieces, by_batch):
    """Whatever the losses are, and also through JSON at every step."""
    losses = [x for count, x in pieces for _ in range(count)]
    arguments = {"steps_back": 10, "skip_batches": 15, "patience": 4}

    def loss_of(step, batch):
        return losses[(batch if by_batch else step) % len(losses)]

    class Stored:
        state = json.dumps(ost.RewindPolicy(**arguments).get_state(), allow_nan=False)

        def update(self, step, metrics):
            policy = ost.RewindPolicy(**arguments)
            policy.set_state(json.loads(self.state))
            decision = policy.update(step, metrics)
            self.state = json.dumps(policy.get_state(), allow_nan=False)
            return decision

    steps = 300
    run = simulate(loss_of, ost.RewindPolicy(**arguments), steps)
    assert run == simulate(loss_of, Stored(), steps)
    _, rewinds, end = run
    assert end != "lost"
    # Three for every stretch of 25 steps that was passed.
    assert len(rewinds) <= 3 * (1 + steps // 25)


def test_the_state_stays_small():
    policy = ost.RewindPolicy()
    watch(2.0 + 0.1 * np.sin(np.arange(20_000)), policy)
    assert len(json.dumps(policy.get_state())) < 40_000


@pytest.mark.parametrize("number", [np.float32(2), np.array(2.0), 2])
def test_any_number_is_a_loss(number):
    assert ost.RewindPolicy().update(1, {"loss": number}).action == "continue"


def test_another_metric_can_be_watched():
    policy = ost.RewindPolicy(metric="eval/loss", patience=2)
    for step, x in enumerate([1.0, 1.0, 1.0, 5.0], start=1):
        decision = policy.update(step, {"eval/loss": x, "loss": 1.0})
    assert decision.reason == (
        "eval/loss is at 3 since step 4, 2 above the recent minimum"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_back": 0}, "steps_back=0 must be an integer of at least 1"),
        ({"skip_batches": 1.5}, "skip_batches=1.5 must be an integer"),
        ({"max_rewinds": -1}, "max_rewinds=-1 must be an integer of at least 0"),
        ({"patience": 1}, "patience=1 must be an integer of at least 2"),
        ({"rise": 0.0}, r"rise=0.0 is outside \(0, inf\)"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        ost.RewindPolicy(**arguments)


def test_a_missing_loss_is_explained():
    with pytest.raises(ValueError, match="metrics has no 'loss', but grad/norm; give"):
        ost.RewindPolicy().update(1, {"grad/norm": 1.0})
