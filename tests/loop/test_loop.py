"""The loop of a run: killed at any moment, it takes the course it would have taken."""

import copy
import itertools
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import survival
from tiers import full

import optax_stability as ost
from optax_stability.loop import (
    DivergedError,
    NotSavedError,
    Schedule,
    TrainingLoop,
    Window,
)
from optax_stability.orbax import Checkpoints, select_checkpoints

# Evaluations and checkpoints fall apart on purpose.
SCHEDULE = Schedule(steps=24, eval_every=6, checkpoint_every=4)
HARMFUL = {9, 10, 24, 29}
# The guard skips these. 3 and 14 are bad whenever they are tried, 11 is that of a
# rewind, and some of the others are skipped once more when they are drawn again.
FLAGGED = {3, 11, 14, 19, 20, 22, 35, 36, 41, 43}
BAD_DATA = {3, 14}
KEEP = 4


class Killed(BaseException):
    """What nothing in the loop may catch."""


class Life:
    """Ends at the given call of those that a process makes."""

    def __init__(self, calls=None):
        self.calls, self.left = 0, calls

    def tick(self, name):
        del name
        self.calls += 1
        if self.calls == self.left:
            raise Killed


class EndWhileSaving(Life):
    """Ends the process for good, while the given checkpoint is being written."""

    def tick(self, name):
        if name == "save":
            self.calls += 1
        elif self.calls == self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def mortal(life, target, *names):
    """Hands calls on, as long as there is life."""

    def hand_on(name):
        def call(*args, **kwargs):
            life.tick(name)
            return getattr(target, name)(*args, **kwargs)

        return call

    return SimpleNamespace(**{name: hand_on(name) for name in names})


def train_step(state, batch, harm):
    """Chaotic: a wrong bit or batch anywhere shows in all that follows."""
    x = (state["x"] + 1e-3 * batch) % 1
    state = {"x": 3.9 * x * (1 - x), "harm": state["harm"] + harm}
    loss = state["x"].mean() + 9 * state["harm"]
    return state, {"loss": loss, "histogram": state["x"]}


class NumpyRun:
    """What the loop drives, without a model."""

    tokens_per_step = 10
    flagged = FLAGGED

    def __init__(self, life=None):
        self._life, self._step = life or Life(), train_step
        self.step = 0  # That of the batch it was given last.
        self.state = {"x": np.float32([0.3, 0.4]), "harm": np.float32(0)}

    def advance(self, drawn):
        self._life.tick("advance")
        self.step = drawn.step
        skipped = drawn.batch in self.flagged
        state, metrics = self._step(
            copy.deepcopy(self.state) if skipped else self.state,
            np.float32(drawn.position + 1),
            np.float32(drawn.batch in HARMFUL),
        )
        self.state = self.state if skipped else state
        guard = {"skip/skipped": skipped, "skip/value_limit": 2.0}
        return metrics | {key: np.float32(x) for key, x in guard.items()}

    def examine(self, drawn):
        self._life.tick("examine")
        loss = float(self.state["x"][1]) + 9 * (drawn.position + 1 in BAD_DATA)
        return [Window(loss - 0.1, "a", "f, 0"), Window(loss + 0.1, "b", "f, 1")]

    def evaluate(self):
        self._life.tick("evaluate")
        return {"eval/loss": float(self.state["x"][0])}

    def speed(self, seconds):
        return {"perf/seconds": seconds}


class UnflaggedRun(NumpyRun):
    flagged = frozenset()


jitted_step = jax.jit(train_step, donate_argnums=0)


class JaxRun(NumpyRun):
    def __init__(self, life=None):
        super().__init__(life)
        self.state = jax.device_put(self.state, jax.devices()[0])
        self._step = jitted_step


class AfterThree:
    """Goes back after three bad losses in a row, and farther every time."""

    def __init__(self):
        self._bad = self._rewinds = 0

    def update(self, step, metrics):
        self._bad = self._bad + 1 if metrics["loss"] > 5 else 0
        if self._bad < 3:
            return ost.Decision("continue")
        self._bad, self._rewinds = 0, self._rewinds + 1
        if self._rewinds > 9:
            return ost.Decision("stop", reason="lost")
        return ost.Decision("rewind", max(0, step - 3 * self._rewinds), step + 2)

    def get_state(self):
        return [self._bad, self._rewinds]

    def set_state(self, state):
        self._bad, self._rewinds = state


class Memory:
    """As Checkpoints, on a disk that outlives the process."""

    def __init__(self, disk, keep=KEEP):
        self.disk, self._keep, self._pending = disk, keep, []
        self.damaged, self.failed = set(), None
        self.full = lambda: False

    def poll(self):
        """Has nothing to report."""

    def wait(self):
        self.flush()
        return self.failed

    def newest(self):
        while found := self.available():
            if self.first_whole(found[:1]):
                return found[0]
        return None

    def first_whole(self, candidates):
        for each in candidates:
            if each["batch"] not in self.damaged:
                return each
            del self.disk[each["batch"]]
        return None

    def save(self, state, progress):
        self.flush()
        if progress["batch"] not in self.disk:
            self.damaged.discard(progress["batch"])
        self.failed = "No space left on device" if self.full() else None
        if self.failed:
            return
        if progress["batch"] in self.disk:
            self._delete()
        else:
            self._pending = [(copy.deepcopy(state), json.dumps(progress))]

    def flush(self, *, deletes=True):
        for state, text in self._pending:
            self.disk[json.loads(text)["batch"]] = state, text
            if deletes:
                self._delete()
        self._pending = []

    def may_leave(self):
        """What is on the disk when the process is killed now."""
        yield dict(self.disk)  # What was being written is lost …
        if self._pending:
            self.flush(deletes=False)  # … or whole, and what it replaces there, too …
            yield dict(self.disk)
            self._delete()  # … or deleted.
            yield dict(self.disk)

    def _delete(self):
        count = [each["batch"] for each in self._count()]
        for batch in set(self.disk) - set(count):
            del self.disk[batch]

    def _count(self):
        progress = (json.loads(x) for _, x in self.disk.values())
        return select_checkpoints(progress, self._keep)

    def available(self):
        self.flush()
        return self._count()

    def load(self, progress, like):
        del like
        return copy.deepcopy(self.disk[progress["batch"]][0])


def go(
    saved,
    log,
    *,
    run=NumpyRun,
    policy=AfterThree,
    life=None,
    writer=ost.RunLog,
    due=lambda: False,
    kept=None,
):
    """Starts a run or goes on with it, as examples/gpt/train.py does."""
    life = life or Life()
    newest = saved.newest()
    writer = writer(log, resume_after=newest and newest["batch"])
    run = run(life)
    names = ("save", "available", "load", "poll", "wait", "first_whole", "newest")
    saved = mortal(life, saved, *names)
    writer = mortal(life, writer, "write")
    policy = mortal(life, policy(), "update", "get_state", "set_state")
    more = {"about": {"about": "it"}, "policy": policy, "keep_flagged": kept}
    loop = TrainingLoop(run, saved, SCHEDULE, [writer], **more)
    if newest:
        loop.resume(newest)
    loop.train(SimpleNamespace(due=due))
    return loop, run


def at_once():
    """A stop that is due after the next step."""
    return True


def without_times(row):
    return {key: x for key, x in row.items() if not key.startswith("perf/")}


def course(saved, log, loop, run):
    """All that must be the same."""
    return (
        [without_times(json.loads(line)) for line in log.read_text().splitlines()],
        {key: np.asarray(x).tobytes() for key, x in run.state.items()},
        (loop.step, loop.batch, loop._again, loop._repeated),
        [json.dumps(each) for each in saved.available()],
        # A run that was complete knows its last evaluation only.
        {key: x for key, x in loop.row.items() if key.startswith("eval/")},
    )


def rewinds(log):
    rows = map(json.loads, log.read_text().splitlines())
    return [
        (row["rewind/from"], row["rewind/to"], row["batch"])
        for row in rows
        if "rewind/to" in row
    ]


def recent_median():
    return ost.RewindPolicy(steps_back=3, skip_batches=4, patience=4, rise=3.0)


@pytest.fixture
def undisturbed(tmp_path):
    """The course that ``go`` takes in memory, as often as it is needed."""

    def of(policy):
        life, log, saved = Life(), tmp_path / "undisturbed.jsonl", Memory({})
        finished = go(saved, log, policy=policy, life=life)
        assert len(rewinds(log)) >= 2, rewinds(log)  # Or the tests would say little.
        return course(saved, log, *finished), life.calls

    return of


@pytest.mark.parametrize("policy", [AfterThree, recent_median])
@full
def test_a_run_that_is_killed_at_any_call_takes_the_same_course(
    tmp_path, undisturbed, policy
):
    expected, calls = undisturbed(policy)
    log = tmp_path / "log.jsonl"
    for last in range(1, calls + 1):
        killed = Memory({})
        log.unlink(missing_ok=True)
        with pytest.raises(Killed):
            go(killed, log, policy=policy, life=Life(last))
        with log.open("a") as file:
            file.write('{"step": 7, "lo')  # A torn line.
        left = log.read_text()
        for disk in killed.may_leave():
            log.write_text(left)
            saved = Memory(disk)
            assert course(saved, log, *go(saved, log, policy=policy)) == expected, last
            survival.count(survival.KILLS)


class Misfortune(Life):
    """What befalls a process: how it ends, and from when its disk is full."""

    def __init__(self, random):
        super().__init__(int(random.integers(5, 120)))
        self._full = int(random.choice([0, 5, 20, 60, 1000]))
        self._stops = random.random() < 0.3

    def is_full(self):
        return self.calls > self._full

    def tick(self, name):
        del name
        self.calls += 1
        if self.calls >= self.left and not self._stops:
            raise Killed

    def due(self):
        return self._stops and self.calls >= self.left

    def log(self, path, resume_after):
        """A log on the same disk."""
        life = self

        class FullLog(ost.RunLog):
            def _flush(self):
                if life.is_full():
                    raise OSError(28, "No space left on device")
                super()._flush()

        return FullLog(path, resume_after=resume_after, report=lambda text: None)


def scratch(log, random):
    """What a crash, or a person, leaves in a log after its last whole line."""
    left = [b"", b'{"step": 7, "lo', b"\0" * 99, b"\n\n", b"oops\n", b"\xff\n{"]
    with log.open("ab") as file:
        file.write(left[random.integers(len(left))])


@pytest.mark.parametrize("policy", [AfterThree, recent_median])
def test_a_thousand_interruptions_and_damages_change_nothing(tmp_path, policy):
    """Kills at random calls, signals, full disks, bad lines, damaged checkpoints."""
    log, keep = tmp_path / "log.jsonl", 99
    saved = Memory({}, keep)
    expected = course(saved, log, *go(saved, log, policy=policy))
    random = np.random.default_rng(0)
    suffered = 0
    while suffered < 500:
        disk = {}
        log.unlink(missing_ok=True)
        ended = None
        while ended is None:
            saved, life = Memory(disk, keep), Misfortune(random)
            if len(saved.available()) > 1 and random.random() < 0.2:
                saved.damaged = {saved.available()[0]["batch"]}
                suffered += 1
            saved.full = life.is_full
            try:
                loop, run = go(
                    saved, log, policy=policy, life=life, writer=life.log, due=life.due
                )
                if loop.step == SCHEDULE.steps:
                    ended = loop, run
            # Diverged: without a checkpoint, for the disk was full from the start.
            except (Killed, NotSavedError, DivergedError):
                suffered += 1
            left = list(saved.may_leave())
            disk = left[random.integers(len(left))] if ended is None else left[-1]
            if ended is None:
                scratch(log, random)
        assert course(Memory(disk, keep), log, *ended) == expected
    survival.count(survival.KILLS, suffered)


class Terminated(Life):
    """Is asked to stop at the given call, whatever is going on."""

    def tick(self, name):
        del name
        self.calls += 1
        if self.calls == self.left:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("every", [pytest.param(1, marks=full), 7])
def test_a_signal_at_any_call_stops_it_after_the_step(tmp_path, undisturbed, every):
    """Also while it evaluates, saves, goes back or looks at a batch again."""
    expected, calls = undisturbed(AfterThree)
    log = tmp_path / "log.jsonl"
    for at in range(1, calls + 1, every):
        saved = Memory({})
        log.unlink(missing_ok=True)
        with ost.StopRequest() as stop:
            loop, run = go(saved, log, life=Terminated(at), due=stop.due)
        assert stop.requested == "SIGTERM"
        assert saved.available()[0]["batch"] == loop.batch  # Nothing would be lost.
        if loop.step < SCHEDULE.steps:
            saved = Memory(saved.disk)
            loop, run = go(saved, log)
        assert course(saved, log, loop, run) == expected, at
        survival.count(survival.STOPS)


def test_a_clock_that_jumps_changes_nothing(tmp_path, undisturbed, monkeypatch):
    expected, _ = undisturbed(AfterThree)
    jumps = itertools.cycle([1e9, -1e9, 0.0, 0.0])
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    log, saved = tmp_path / "log.jsonl", Memory({})
    assert course(saved, log, *go(saved, log)) == expected


def test_a_last_checkpoint_that_cannot_be_saved_is_one_line(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    saved.full = lambda: bool(saved.disk)
    says = (
        r"^step 24 could not be saved \(No space left on device\): the newest "
        r"checkpoint is that of step 0; make room, and give the same command again$"
    )
    with pytest.raises(NotSavedError, match=says):
        go(saved, log, policy=quiet)
    saved.full = lambda: False
    loop, _ = go(saved, log, policy=quiet)
    assert (loop.step, saved.available()[0]["step"]) == (24, 24)


def test_a_full_disk_at_the_end_gets_a_second_chance(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    failures = [True]
    saved.full = lambda: 20 in saved.disk and bool(failures) and failures.pop()
    go(saved, log, run=UnflaggedRun, policy=quiet)
    assert not failures
    assert saved.available()[0]["step"] == 24


def test_without_any_checkpoint_a_rewind_is_one_line(tmp_path):
    class Removed(Memory):
        def available(self):
            self.flush()
            self.disk.clear()
            return []

    decision = ost.Decision("rewind", 2, 19, "loss is at 9")
    with pytest.raises(DivergedError, match="loss is at 9, and there is no checkpoint"):
        go(Removed({}), tmp_path / "log", policy=lambda: Scripted(18, decision))


def test_a_rewind_passes_over_a_damaged_checkpoint(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})

    class Damaging(UnflaggedRun):
        def advance(self, drawn):
            if drawn.step == 15:
                saved.damaged.add(12)
            return super().advance(drawn)

    decision = ost.Decision("rewind", 13, 19)
    go(saved, log, run=Damaging, policy=lambda: Scripted(18, decision))
    assert rewinds(log) == [(18, 8, 18)]


def test_a_run_that_ends_in_nan_has_failed_also_when_it_is_asked_again(tmp_path):
    class Broken(UnflaggedRun):
        def evaluate(self):
            return {"eval/loss": np.nan if self.step > 20 else 1.0}

    log, saved = tmp_path / "log.jsonl", Memory({})
    for _ in range(2):
        with pytest.raises(DivergedError, match="the run ends with a held-out loss"):
            go(saved, log, run=Broken)
        assert saved.available()[0]["step"] == 24


def rechecks(log):
    rows = map(json.loads, log.read_text().splitlines())
    return {row["recheck/step"]: row for row in rows if "recheck/verdict" in row}


def quiet():
    return Scripted(99, None)


def test_what_is_wrong_with_the_machine_is_trained_on_after_all(tmp_path):
    log, seen = tmp_path / "log.jsonl", []

    class Noted(NumpyRun):
        flagged = FLAGGED - {11}

        def advance(self, drawn):
            metrics = super().advance(drawn)
            seen.append((drawn, bool(metrics["skip/skipped"])))
            return metrics

    loop, _ = go(Memory({}), log, run=Noted, policy=quiet)
    found = rechecks(log)
    assert sorted(found) == [3, 14, 19, 20, 22]
    assert [found[k]["recheck/verdict"] for k in sorted(found)] == [1, 1, 0, 0, 1]
    # With the parameters of one step later, and in its row.
    assert [found[k]["step"] - k for k in sorted(found)] == [1] * 5
    assert found[14]["recheck/worst"] == pytest.approx(found[14]["recheck/loss"] + 0.1)
    assert found[14]["recheck/origin"] == "f, 1"
    # Batch 18 (from 0) two steps later, and 19, which the guard flags once more.
    assert [drawn.position for drawn, _ in seen] == [*range(20), 18, 19, 20, 21]
    assert [drawn.again for drawn, _ in seen] == [False] * 20 + [True] * 2 + [False] * 2
    assert (loop._repeated, loop._again) == (2, [])
    trained = [drawn.position for drawn, skipped in seen if not skipped]
    assert len(set(trained)) == len(trained)


def test_a_rewind_passes_over_what_was_to_be_drawn_again(tmp_path):
    drawn = []

    class Noted(NumpyRun):
        flagged = frozenset({11})

        def advance(self, draw):
            drawn.append(draw)
            return super().advance(draw)

    log = tmp_path / "log.jsonl"
    decision = ost.Decision("rewind", 8, 14)
    go(Memory({}), log, run=Noted, policy=lambda: Scripted(12, decision))
    assert rewinds(log) == [(12, 8, 13)]
    assert [row["recheck/verdict"] for row in rechecks(log).values()] == [0]
    assert not any(each.again for each in drawn)


def test_flagged_batches_are_kept_as_text_the_worst_window_first(tmp_path):
    class Kept(NumpyRun):
        flagged = FLAGGED - {11}

    folder = tmp_path / "flagged"
    go(Memory({}), tmp_path / "log.jsonl", run=Kept, policy=quiet, kept=folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"step_{n}.txt" for n in (3, 14, 19, 20, 22)
    )
    text = (folder / "step_14.txt").read_text()
    assert text.startswith("Step 14, batch 14: loss ")
    assert "with the parameters of step 15, which is abnormal again: the data" in text
    assert text.index("f, 1\nb") < text.index("f, 0\na")
    assert "normal: the machine" in (folder / "step_19.txt").read_text()
    assert "it was flagged twice: the data" in (folder / "step_22.txt").read_text()


def test_the_last_step_is_looked_at_again_as_well(tmp_path):
    class Last(NumpyRun):
        flagged = frozenset({24})

    log = tmp_path / "log.jsonl"
    go(Memory({}), log, run=Last, policy=quiet)
    assert [row["step"] for row in rechecks(log).values()] == [24]


@pytest.mark.parametrize("policy", [AfterThree, recent_median])
def test_a_run_that_is_stopped_after_any_step_takes_the_same_course(
    tmp_path, undisturbed, policy
):
    expected, _ = undisturbed(policy)
    saved, log, stops = Memory({}), tmp_path / "log.jsonl", 0
    loop, run = go(saved, log, policy=policy, due=at_once)
    while loop.step < SCHEDULE.steps:
        assert saved.available()[0]["batch"] == loop.batch  # Nothing would be lost.
        saved, stops = Memory(saved.disk), stops + 1
        loop, run = go(saved, log, policy=policy, due=at_once)
    assert stops > SCHEDULE.steps
    assert course(saved, log, loop, run) == expected
    survival.count(survival.STOPS, stops)


def test_the_log_reads_as_that_of_the_course_that_counts(tmp_path):
    log = tmp_path / "log.jsonl"
    go(Memory({}), log)
    columns = ost.read_log(log)
    assert columns["step"].tolist() == list(range(SCHEDULE.steps + 1))
    assert (np.diff(columns["batch"]) > 0).all()
    assert not HARMFUL & set(columns["batch"].astype(int))
    assert np.nanmax(columns["loss"]) < 1


def test_a_rewind_restores_a_step_and_leaves_batches_out(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    loop, _ = go(saved, log)
    # Steps 9 to 11 were bad: 11 − 3 = 8, and the next batch is the 13th …
    assert rewinds(log)[0] == (11, 8, 12)
    # … so that of step n is n + 4. Steps 20 to 22 were bad, 22 − 6 = 16, and so on.
    assert rewinds(log)[1] == (22, 16, 27)
    # The newest checkpoint up to 20 − 9 = 11 is that of the first rewind.
    assert rewinds(log)[2] == (20, 8, 32)
    assert (loop.step, loop.batch) == (24, 48)


class Scripted(AfterThree):
    """Decides as it is told, once."""

    def __init__(self, at, decision):
        super().__init__()
        self._script = {at: decision}

    def update(self, step, metrics):
        del metrics
        return self._script.pop(step, ost.Decision("continue"))


def test_without_an_older_checkpoint_a_rewind_takes_the_oldest(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    decision = ost.Decision("rewind", 2, 19)
    go(saved, log, run=UnflaggedRun, policy=lambda: Scripted(18, decision))
    assert rewinds(log) == [(18, 4, 18)]  # KEEP are 4, 8, 12 and 16.


class BranchingRun(UnflaggedRun):
    """All of whose bad losses are of a branch, or of a probe."""

    def advance(self, drawn):
        metrics = super().advance(drawn)
        key = "branch/mode" if self.step % 2 else "branch/probed"
        return metrics | {key: np.float32(metrics["loss"] > 5)}


def test_losses_that_may_be_taken_back_send_nothing_back(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    go(saved, log, run=BranchingRun)
    assert rewinds(log) == []
    losses = [
        row["loss"]
        for row in map(json.loads, log.read_text().splitlines())
        if "loss" in row
    ]
    assert max(losses) > 5


def test_a_run_that_gave_up_gives_up_again(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    stop = ost.Decision("stop", reason="loss is no number")
    for _ in range(2):
        with pytest.raises(DivergedError, match="loss is no number"):
            go(saved, log, policy=lambda: Scripted(18, stop))
        assert saved.available()[0]["step"] == 16


class Watched:
    """Notes how many steps the device has been given when a row is written."""

    def __init__(self, run):
        self._run, self.seen, self.histograms = run, {}, []

    def write(self, step, row):
        if "loss" in row:
            self.seen[step] = self._run.step
        arrays = {key for key, x in row.items() if np.ndim(x)}
        if arrays:
            assert arrays == {"histogram"}
            self.histograms.append(step)


def test_the_host_looks_at_a_step_when_the_next_one_is_on_its_way():
    schedule = Schedule(steps=8, eval_every=5, checkpoint_every=7, histogram_every=3)
    run = NumpyRun()
    writer = Watched(run)
    loop = TrainingLoop(run, Memory({}), schedule, [writer])
    loop.train(SimpleNamespace(due=lambda: False))
    # But for what an evaluation, a checkpoint or the end has to wait for.
    late = {1: 2, 2: 3, 3: 4, 4: 5, 5: 5, 6: 7, 7: 7, 8: 8}
    assert writer.seen == late
    assert writer.histograms == [1, 4, 7]


def test_a_checkpoint_has_an_evaluation_only_of_its_own_state(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    go(saved, log)
    evaluated = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        if "eval/loss" in row:
            evaluated[row["step"]] = row["eval/loss"]
    states = {
        json.loads(text)["step"]: (state, json.loads(text))
        for state, text in saved.disk.values()
    }
    assert states.keys() - evaluated.keys()
    assert states.keys() & evaluated.keys()
    for state, progress in states.values():
        if "eval/loss" in progress:
            assert progress["eval/loss"] == float(state["x"][0])


def test_a_stopped_run_keeps_what_it_can_go_back_to(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    for _ in range(7):
        go(saved, log, policy=AfterThree, due=at_once)
    line = saved.available()
    assert [each["step"] for each in line] == [7, 4, 0]
    assert [each.get("interim", False) for each in line] == [True, False, False]
    # And to nothing else: without the stops there would be no step 7.
    go(saved, log, policy=lambda: Scripted(8, ost.Decision("rewind", 7, 10)))
    assert rewinds(log) == [(8, 4, 9)]


# --- on a disk -------------------------------------------------------------------


def finish(folder, life=None):
    """A run with checkpoints in a folder."""
    with Checkpoints(folder / "checkpoints", KEEP) as saved:
        log = folder / "log.jsonl"
        finished = go(saved, log, run=JaxRun, life=life)
        return course(saved, log, *finished)


@full
def test_a_run_that_is_killed_again_and_again_takes_the_same_course(tmp_path):
    expected = finish(tmp_path / "undisturbed")
    folder, lives = tmp_path / "killed", np.random.default_rng(0)
    found, deaths = None, 0
    while found is None:
        try:
            found = finish(folder, Life(lives.integers(10, 60)))
        except Killed:
            deaths += 1
            # As if another checkpoint had been under way.
            half = folder / "checkpoints" / "1000.orbax-checkpoint-tmp"
            half.mkdir(parents=True, exist_ok=True)
            (half / "_CHECKPOINT_METADATA").write_text("{")
    assert deaths > 5
    assert found == expected
    assert not half.exists()
    survival.count(survival.KILLS, deaths)


@full
def test_a_process_that_is_killed_while_it_saves_takes_the_same_course(tmp_path):
    expected = finish(tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    context = multiprocessing.get_context("spawn")
    for checkpoint in (3, 2):
        life = EndWhileSaving(checkpoint)
        process = context.Process(target=finish, args=(folder, life))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()
        survival.count(survival.KILLS)
    assert finish(folder) == expected


def test_ctrl_c_stops_between_two_steps_and_saves(tmp_path):
    class Interrupted(UnflaggedRun):
        def advance(self, drawn):
            if drawn.step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super().advance(drawn)

    run, saved, rows = Interrupted(), Memory({}), []
    writer = SimpleNamespace(write=lambda step, row: rows.append(step))
    with ost.StopRequest() as stop:
        loop = TrainingLoop(run, saved, SCHEDULE, [writer])
        loop.train(stop)
    assert stop.requested == "SIGINT"
    assert rows == [0, 1, 2, 3, 4, 5, 6, 6]  # The last is an evaluation.
    assert saved.available()[0]["step"] == loop.step == 6
