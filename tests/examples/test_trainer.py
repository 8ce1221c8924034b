"""The loop of a run: killed at any moment, it takes the course it would have taken."""

import copy
import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import survival
from checkpoints import Checkpoints, select_checkpoints
from stopping import StopRequest
from tiers import full
from trainer import DivergedError, Schedule, Trainer
from writers import JsonLines, Writer, read_json_lines

import optax_stability as ost

# Evaluations and checkpoints fall apart on purpose.
SCHEDULE = Schedule(steps=24, eval_every=6, checkpoint_every=4)
HARMFUL = {9, 10, 24, 29}
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
    """What the trainer drives, without a model."""

    tokens_per_step = 10
    flops_per_token = 1.0

    def __init__(self, life=None):
        self._life, self._step = life or Life(), train_step
        self.step = self.batch = 0
        self.state = {"x": np.float32([0.3, 0.4]), "harm": np.float32(0)}

    def advance(self):
        self._life.tick("advance")
        batch = self.batch + 1
        self.state, metrics = self._step(
            self.state, np.float32(batch), np.float32(batch in HARMFUL)
        )
        self.step, self.batch = self.step + 1, batch
        return metrics

    def evaluate(self):
        self._life.tick("evaluate")
        return {"eval/loss": float(self.state["x"][0])}


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

    def __init__(self, disk):
        self.disk, self._pending = disk, []

    def save(self, state, progress):
        self.flush()
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
        return select_checkpoints((json.loads(x) for _, x in self.disk.values()), KEEP)

    def available(self):
        self.flush()
        return self._count()

    def load(self, progress, like):
        del like
        return copy.deepcopy(self.disk[progress["batch"]][0])


def go(saved, log, *, run=NumpyRun, policy=AfterThree, life=None, stop=""):
    """Starts a run or goes on with it, as examples/gpt/train.py does."""
    life = life or Life()
    newest = next(iter(saved.available()), None)
    writer = JsonLines(log, resume_after=newest and newest["batch"])
    run = run(life)
    saved = mortal(life, saved, "save", "available", "load")
    writer = mortal(life, writer, "write", "write_histograms")
    policy = mortal(life, policy(), "update", "get_state", "set_state")
    trainer = Trainer(SCHEDULE, run, saved, writer, {"about": "it"}, policy)
    if newest:
        trainer.resume(newest)
    trainer.train(SimpleNamespace(due=lambda: bool(stop)))
    return trainer, run


def without_times(row):
    return {key: x for key, x in row.items() if not key.startswith("perf/")}


def course(saved, log, trainer, run):
    """All that must be the same."""
    return (
        [without_times(json.loads(line)) for line in log.read_text().splitlines()],
        {key: np.asarray(x).tobytes() for key, x in run.state.items()},
        (run.step, run.batch, without_times(trainer.row)),
        [json.dumps(each) for each in saved.available()],
    )


def rewinds(log):
    rows = map(json.loads, log.read_text().splitlines())
    return [
        (row["rewind/from"], row["rewind/to"], row["batch"])
        for row in rows
        if "rewind/to" in row
    ]


def recent_median():
    return ost.RewindPolicy(steps_back=3, skip_batches=4, patience=4)


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


@pytest.mark.parametrize("policy", [AfterThree, recent_median])
def test_a_run_that_is_stopped_after_any_step_takes_the_same_course(
    tmp_path, undisturbed, policy
):
    expected, _ = undisturbed(policy)
    saved, log, stops = Memory({}), tmp_path / "log.jsonl", 0
    trainer, run = go(saved, log, policy=policy, stop="SIGTERM")
    while run.step < SCHEDULE.steps:
        assert saved.available()[0]["batch"] == run.batch  # Nothing would be lost.
        saved, stops = Memory(saved.disk), stops + 1
        trainer, run = go(saved, log, policy=policy, stop="SIGTERM")
    assert stops > SCHEDULE.steps
    assert course(saved, log, trainer, run) == expected
    survival.count(survival.STOPS, stops)


def test_the_log_reads_as_that_of_the_course_that_counts(tmp_path):
    log = tmp_path / "log.jsonl"
    go(Memory({}), log)
    columns = read_json_lines(log)
    assert columns["step"].tolist() == list(range(SCHEDULE.steps + 1))
    assert (np.diff(columns["batch"]) > 0).all()
    assert not HARMFUL & set(columns["batch"].astype(int))
    assert np.nanmax(columns["loss"]) < 1


def test_a_rewind_restores_a_step_and_leaves_batches_out(tmp_path):
    log, saved = tmp_path / "log.jsonl", Memory({})
    _, run = go(saved, log)
    # Steps 9 to 11 were bad: 11 − 3 = 8, and the next batch is the 13th …
    assert rewinds(log)[0] == (11, 8, 12)
    # … so that of step n is n + 4. Steps 20 to 22 were bad, 22 − 6 = 16, and so on.
    assert rewinds(log)[1] == (22, 16, 27)
    # The newest checkpoint up to 20 − 9 = 11 is that of the first rewind.
    assert rewinds(log)[2] == (20, 8, 32)
    assert (run.step, run.batch) == (24, 48)


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
    go(saved, log, policy=lambda: Scripted(18, decision))
    assert rewinds(log) == [(18, 4, 18)]  # KEEP are 4, 8, 12 and 16.


class BranchingRun(NumpyRun):
    """All of whose bad losses are of a branch, or of a probe."""

    def advance(self):
        metrics = super().advance()
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


class Watched(Writer):
    """Notes how many steps the device has been given when a row is written."""

    def __init__(self, run):
        self._run, self.seen, self.histograms = run, {}, []

    def write(self, step, row):
        if "loss" in row:
            self.seen[step] = self._run.step

    def write_histograms(self, step, counts):
        assert counts.keys() == {"histogram"}
        self.histograms.append(step)

    def close(self):
        """Has nothing to do."""


def test_the_host_looks_at_a_step_when_the_next_one_is_on_its_way():
    schedule = Schedule(steps=8, eval_every=5, checkpoint_every=7, histogram_every=3)
    run = NumpyRun()
    writer = Watched(run)
    trainer = Trainer(schedule, run, Memory({}), writer, {}, None)
    trainer.train(SimpleNamespace(due=lambda: False))
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
        go(saved, log, policy=AfterThree, stop="SIGINT")
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
            half = folder / "checkpoints" / "1000"
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
    class Interrupted(NumpyRun):
        def advance(self):
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().advance()

    run, saved, rows = Interrupted(), Memory({}), []
    writer = SimpleNamespace(write=lambda step, row: rows.append(step))
    with StopRequest() as stop:
        Trainer(SCHEDULE, run, saved, writer, {}, None).train(stop)
    assert stop.requested == "SIGINT"
    assert rows == [0, 1, 2, 3, 4, 5, 6, 6]  # The last is an evaluation.
    assert saved.available()[0]["step"] == run.step == 6
