"""When to go back, where to, and past which batches."""

import json
import math
import statistics

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
    """Fewer bad batches than half of the patience remain: they are no new rise."""
    policy = ost.RewindPolicy(steps_back=100, skip_batches=1)
    _, ((seen, restored, following),), end = simulate(
        lambda step, batch: 9.0 if 300 <= batch < 315 else 2.0, policy, steps=400
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


class Plain:
    """The rule of the docstring, spelled out."""

    def __init__(self, steps_back, patience, rise=0.5):
        self.memory, self.window = 2 * (10 * steps_back + patience), 10 * steps_back
        self.patience, self.rise, self.losses = patience, rise, {}
        self.reached = {}

    def lowest(self, first, last):
        medians = self.medians().items()
        return min((m for t, m in medians if first <= t <= last), default=math.inf)

    def update(self, step, loss):
        """Whether it has diverged, and since when."""
        for undone in self.losses:
            if undone >= step:
                level = self.lowest(undone - self.window + 1, undone)
                self.reached[undone] = min(level, self.reached.get(undone, math.inf))
        near = self.reached.items()
        self.reached = {t: x for t, x in near if -self.memory < t - step <= self.memory}
        counted = {t: x for t, x in self.losses.items() if t < step}
        counted[step] = loss if math.isfinite(loss) else math.inf
        self.losses = {t: x for t, x in counted.items() if t > step - self.memory}
        before = self.lowest(step - self.window, step - 1)
        limit = min(before, self.reached.get(step, math.inf)) + self.rise
        recent = dict(list(self.losses.items())[-self.patience :])
        median = self.medians().get(step)
        if median is None:
            bad = sum(x == math.inf for x in recent.values())
            median = math.inf if bad > self.patience / 2 else -math.inf
        if not (median > limit or median == math.inf):
            return None
        return next(t for t, x in recent.items() if x > limit or x == math.inf)

    def medians(self):
        steps, losses = list(self.losses), list(self.losses.values())
        return {
            steps[i]: statistics.median(losses[i + 1 - self.patience : i + 1])
            for i in range(self.patience - 1, len(steps))
        }


def since(decision):
    """What a decision says of the onset; None if it says to go on."""
    if decision.action == "continue":
        return None
    return int(decision.reason.split("since step ")[1].split(",")[0])


levels = st.sampled_from([1.0, 1.4, 1.6, 2.0, 5.0, math.nan, math.inf])
# How many steps of which loss, then how many steps back; some states go through JSON.
stretches = st.lists(
    st.tuples(st.integers(1, 30), levels, st.integers(0, 60), st.booleans()),
    min_size=1,
    max_size=12,
)
SMALL = [(1, 2), (1, 5), (2, 4), (3, 3)]


@pytest.mark.parametrize(("steps_back", "patience"), SMALL)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(stretches)
def test_after_any_rewinds_only_the_steps_that_count_are_seen(
    steps_back, patience, pieces
):
    arguments = {"steps_back": steps_back, "patience": patience}
    policy, plain, step = ost.RewindPolicy(**arguments), Plain(**arguments), 0
    line = {}  # The steps that count, with their losses.
    farthest = undone = 0
    for count, loss, back, restored in pieces:
        for _ in range(count):
            step += 1
            line = {t: x for t, x in line.items() if t < step} | {step: loss}
            farthest = max(farthest, step)
            found = since(policy.update(step, {"loss": loss}))
            assert found == plain.update(step, loss)
        if farthest - step <= 10 * steps_back + patience:
            fresh = ost.RewindPolicy(**arguments)
            alone = since([fresh.update(t, {"loss": line[t]}) for t in line][-1])
            # Where nothing was undone it knows no more than these; elsewhere it also
            # knows what had been reached, and is never more lenient.
            assert found == alone or (found is not None and step <= undone)
        if restored:
            state = json.dumps(policy.get_state(), allow_nan=False)
            policy = ost.RewindPolicy(**arguments)
            policy.set_state(json.loads(state))
        undone = max(undone, step if back else 0)
        step = max(0, step - back)


@pytest.mark.parametrize(("steps_back", "patience"), SMALL)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    stretches, st.integers(1, 40), st.sampled_from([6.0, math.nan]), st.integers(0, 9)
)
def test_a_rise_for_good_is_found_after_anything(
    steps_back, patience, pieces, good, bad, back
):
    """Whatever happened, and however far the run then went back while it was good."""
    policy, step = ost.RewindPolicy(steps_back=steps_back, patience=patience), 0
    for count, loss, undone, _ in pieces:
        for _ in range(count):
            step += 1
            policy.update(step, {"loss": loss})
        step = max(0, step - undone)
    for _ in range(patience + good):
        step += 1
        policy.update(step, {"loss": 1.0})
    step -= min(back, good)
    actions = [policy.update(step + k, {"loss": bad}).action for k in range(1, 99)]
    assert set(actions[:patience]) != {"continue"}


@pytest.mark.parametrize("onset", [40, 60, 100, 300])
def test_trouble_that_returns_ends_the_run(onset):
    """What had been reached is the reference still, even back at the first steps."""
    policy = ost.RewindPolicy(steps_back=20, skip_batches=20)
    taken, rewinds, end = simulate(
        lambda step, batch: falling(step) if batch < onset else 5.55, policy, steps=900
    )
    assert (len(rewinds), end) == (3, "stop")
    assert len(taken) <= onset + 16


def test_a_run_that_goes_back_and_is_as_good_as_before_is_left_alone():
    def loss_of(step, batch):
        return 5.55 if 300 <= batch < 313 else falling(step) + 0.1 * (batch > 312)

    policy = ost.RewindPolicy(steps_back=200, skip_batches=20, max_rewinds=1)
    _, rewinds, end = simulate(loss_of, policy, steps=600)
    assert (len(rewinds), end) == (1, "end")


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
