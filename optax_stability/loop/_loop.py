"""The training loop of a run that can be killed, stopped, resumed and rewound.

*Problem*: everything that keeps a run alive meets in its loop: checkpoints, the log, a
rewind, a signal, a full disk, a batch that is tried once more. Each is short; together
they must leave a course that no kill, at no moment, changes.

*Where*: on the host, around the compiled step. It does not depend on the model: a
:class:`Run` trains and evaluates.

*Cost*: that of :class:`optax_stability.orbax.Checkpoints`. The host reports a step
while the device computes the next one.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from optax_stability._core import _validate
from optax_stability._recovery._rewinding import Decision, RewindPolicy
from optax_stability._recovery._stopping import StopRequest
from optax_stability.loop import _flagged
from optax_stability.loop._errors import DivergedError, NotSavedError
from optax_stability.loop._pace import Pace
from optax_stability.loop._run import Drawn, Row, Run, Schedule, Writer
from optax_stability.orbax import Checkpoints

Metrics = Mapping[str, jax.Array]
Progress = dict[str, Any]


def _evaluation(row: Row) -> Row:
    """The entries of a row that were measured on the held-out part."""
    return {key: x for key, x in row.items() if key.startswith("eval/")}


class TrainingLoop:
    """Trains a run to its end.

    Every step is a row for the writers: ``batch``, ``tokens``, what the step measured,
    and the speed. So is every evaluation, every rewind (``rewind/from``,
    ``rewind/to``), and every batch that was looked at again (``recheck/…``).

    **Guarantees**

    * A run that is killed at any moment, and started again, takes bit for bit the
      course that it would have taken.
    * So does a run that is stopped, by a :class:`optax_stability.StopRequest`.
    * The host reports a step when the next one has been dispatched.
    * After a rewind no batch is seen twice. A damaged checkpoint is passed over.
    * A batch that the guard left out is evaluated again one step later. If its loss is
      normal then, it is trained on after all, once.
    * A run that ends in NaN, or whose last checkpoint could not be saved at the second
      attempt, ends with an error.

    **Edge cases**: steps in an open branch and its probes are not shown to the policy.
    Without a checkpoint that is old enough, a rewind takes the oldest.

    Args:
      run: the run to train, in its first state.
      saved: the checkpoints, to save to and to rewind to.
      schedule: when to evaluate, save and stop.
      writers: receive every row of numbers.
      about: plain values that identify the run; stored in every checkpoint.
      policy: decides when to rewind; None: never.
      keep_flagged: folder for the examples of flagged batches, as text; None: they are
        not kept. With several processes, only the first should give one.

    Attributes:
      step: number of steps taken.
      batch: number of batches drawn; larger than ``step`` after a rewind.
      row: the measurements of the last step and of the last evaluation.

    Raises:
      TypeError: a number of steps is not an int.
      ValueError: a number of steps is out of range.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> class Descent:
      ...     state, tokens_per_step = {"x": jnp.float32(8.0)}, 1
      ...     def advance(self, drawn):
      ...         self.state = {"x": self.state["x"] / 2}
      ...         return {"loss": self.state["x"]}
      ...     def evaluate(self):
      ...         return {"eval/loss": float(self.state["x"])}
      ...     def examine(self, drawn):
      ...         return []
      ...     def speed(self, seconds):
      ...         return {}
      >>> from optax_stability import RunLog, StopRequest, read_log
      >>> folder = Path(tempfile.mkdtemp())
      >>> for steps in (2, 3):  # The second time it resumes.
      ...     with Checkpoints(folder / "checkpoints") as saved, StopRequest() as stop:
      ...         newest = saved.newest()
      ...         log = RunLog(folder / "log", resume_after=newest and newest["batch"])
      ...         loop = TrainingLoop(Descent(), saved, Schedule(steps, 10, 10), [log])
      ...         if newest:
      ...             loop.resume(newest)
      ...         loop.train(stop)
      >>> read_log(folder / "log")["loss"]
      array([nan,  4.,  2.,  1.])
    """

    def __init__(
        self,
        run: Run,
        saved: Checkpoints,
        schedule: Schedule,
        writers: Sequence[Writer] = (),
        *,
        about: Mapping[str, Any] | None = None,
        policy: RewindPolicy | None = None,
        keep_flagged: Path | None = None,
    ):
        """Starts before the first step."""
        for name in ("steps", "eval_every", "checkpoint_every"):
            count = getattr(schedule, name)
            _validate.check_count(name, count, 1, "it counts steps")
        self._run, self._saved, self._schedule = run, saved, schedule
        self._writers, self._about = tuple(writers), dict(about or {})
        self._policy, self._keep_flagged = policy, keep_flagged
        self.step: int = 0
        self.batch: int = 0
        # The batches to draw once more before the next new one, by their position in
        # the data, and how many were drawn once more.
        self._again: list[int] = []
        self._repeated = 0
        # A flagged step whose batch is evaluated again after the next step.
        self._flagged: tuple[Drawn, Row] | None = None
        self._pace = Pace()
        self._unreported: deque[tuple[Drawn, Metrics]] = deque()
        # The batch after which the evaluation in self.row was made.
        self._evaluated: int | None = None
        self.row: Row = {}

    def _draw(self) -> Drawn:
        """Counts the next step; what it is trained on."""
        again = bool(self._again)
        position = self._again.pop(0) if again else self.batch - self._repeated
        self._repeated += again
        self.step, self.batch = self.step + 1, self.batch + 1
        return Drawn(self.step, self.batch, position, again)

    def _write(self, step: int, row: Row) -> None:
        for writer in self._writers:
            writer.write(step, row)

    def _progress(self) -> Progress:
        progress: Progress = {"step": self.step, "batch": self.batch}
        evaluation = _evaluation(self.row)
        if self._evaluated != self.batch:
            evaluation = {}  # It belongs to an older state, which may have been better.
        if self._policy is not None:
            progress["policy"] = self._policy.get_state()
        progress |= {"again": list(self._again), "repeated": self._repeated}
        if self._flagged is not None:
            drawn, row = self._flagged
            progress["flagged"] = [list(drawn), row]
        return self._about | evaluation | progress

    def resume(self, progress: Progress) -> None:
        """Resumes the run from a checkpoint."""
        self._restore(progress, progress["batch"])
        self._again, self._repeated = progress["again"], progress["repeated"]
        if "flagged" in progress:
            drawn, row = progress["flagged"]
            self._flagged = Drawn(*drawn), row
        if self._policy is not None and "policy" in progress:
            self._policy.set_state(progress["policy"])

    def _restore(self, progress: Progress, batch: int) -> None:
        """Loads a checkpoint, and continues after the given batch."""
        run = self._run
        run.state = self._saved.load(progress, like=run.state)
        self.step, self.batch = progress["step"], batch
        self.row, self._evaluated = _evaluation(progress), batch

    def _save(self, *, interim: bool = False) -> None:
        """Saves a checkpoint in the background.

        An interim checkpoint is only for resuming; the run never rewinds to it.
        """
        mark = {"interim": True} if interim else {}
        self._saved.save(self._run.state, self._progress() | mark)
        self._pace.pause()

    def train(self, stop: StopRequest) -> None:
        """Trains up to the last step, or until a stop is requested, and saves.

        Raises:
          DivergedError: the loss diverged more often than the policy allows, or is not
            finite at the end.
          NotSavedError: the last checkpoint could not be saved, at the second attempt.
        """
        schedule = self._schedule
        if self._evaluated is None:  # a new run
            self.row = {"batch": self.batch, "tokens": 0}
            self._evaluate()
        self._save()
        stops = interim = False
        while self.step < schedule.steps and not stops:
            drawn = self._draw()
            self._unreported.append((drawn, self._run.advance(drawn)))
            self._saved.poll()
            stops, last = stop.due(), self.step == schedule.steps
            evaluates = last or self.step % schedule.eval_every == 0
            regular = last or self.step % schedule.checkpoint_every == 0
            saves = regular or stops
            # One step late: the next step is dispatched before the host waits.
            decision = self._report_until(late=0 if evaluates or saves else 1)
            if decision.action != "continue":
                self._rewind(decision)
                continue
            if evaluates:
                self._evaluate()
            if saves:
                interim = not regular
                self._save(interim=interim)
        if self._saved.wait() is not None:
            self._save(interim=interim)  # The next chance may never come.
            self._check_saved()
        self._check_end(stopped=self.step < schedule.steps)

    def _check_saved(self) -> None:
        reason = self._saved.wait()
        if reason is not None:
            newest = next((each["step"] for each in self._saved.available()), 0)
            remedy = "make room, and give the same command again"
            raise NotSavedError(
                f"step {self.step} could not be saved ({reason}): the newest "
                f"checkpoint is that of step {newest}; {remedy}"
            )

    def _check_end(self, *, stopped: bool) -> None:
        """A run that ends in NaN has failed."""
        end = self.row.get("eval/loss", 0.0)
        if not stopped and not math.isfinite(end):
            remedy = "lower the learning rate, or guard the optimizer"
            raise DivergedError(
                f"the run ends with a held-out loss that is not finite; {remedy}"
            )

    def _report_until(self, *, late: int) -> Decision:
        """Reports all unreported steps but the last ``late``."""
        decision = Decision("continue")
        self._recheck()
        while len(self._unreported) > late and decision.action == "continue":
            decision = self._report(*self._unreported.popleft())
            if decision.action == "continue":
                self._recheck()
        return decision

    def _recheck(self) -> None:
        """Looks at a flagged batch again, one step later or at the end.

        Always with the parameters of that step, so that a run that was stopped in
        between takes the same course.
        """
        run, step = self._run, self.step
        if self._flagged is None:
            return
        drawn, row = self._flagged
        if drawn.step < step or step == self._schedule.steps:
            self._flagged = None
            found = _flagged.recheck(run, step, drawn, row, self._keep_flagged)
            at = {"batch": self.batch, "tokens": step * run.tokens_per_step}
            self._write(step, at | found)
            skipped = row.get("skip/skipped")
            if found["recheck/verdict"] == _flagged.MACHINE and skipped:
                self._again.append(drawn.position)

    def _report(self, drawn: Drawn, metrics: Metrics) -> Decision:
        """Logs a finished step, and returns the decision of the policy."""
        step, run = drawn.step, self._run
        found = jax.device_get(metrics)
        row: Row = {"batch": drawn.batch, "tokens": step * run.tokens_per_step}
        row |= {key: float(x) for key, x in found.items() if x.ndim == 0}
        seconds = self._pace.step()
        row |= {} if seconds is None else run.speed(seconds)
        self.row |= row
        # The first step is the recorder's step 0, in which it measures.
        every, histograms = self._schedule.histogram_every, {}
        if every and (step - 1) % every == 0:
            histograms = {key: x for key, x in found.items() if x.ndim}
        self._write(step, row | histograms)
        if _flagged.is_flagged(row):
            needed = sorted(_flagged.NEEDED & row.keys())
            self._flagged = drawn, {key: row[key] for key in needed}
        # The policy ignores steps in an open branch, which may be taken back, and
        # probes, which were measured on the kept parameters.
        ignored = row.get("branch/mode") or row.get("branch/probed")
        if self._policy is None or ignored:
            return Decision("continue")
        return self._policy.update(step, row)

    def _evaluate(self) -> None:
        evaluation = self._run.evaluate()
        self.row |= evaluation
        self._evaluated = self.batch
        at = {key: self.row[key] for key in ("batch", "tokens")}
        self._write(self.step, at | evaluation)
        self._pace.pause()

    def _rewind(self, decision: Decision) -> None:
        """Restores an older state, and skips the harmful batches."""
        if decision.restore_step is None or decision.skip_until is None:
            raise DivergedError(decision.reason)
        regular = [each for each in self._saved.available() if not each.get("interim")]
        at = [each["step"] <= decision.restore_step for each in regular]
        first = at.index(True) if any(at) else -1  # The oldest.
        target = self._saved.first_whole(regular[first:])
        if target is None:
            problem = "there is no checkpoint to go back to"
            raise DivergedError(f"{decision.reason}, and {problem}")
        reported, ahead = self.step - len(self._unreported), self.batch - self.step
        self._unreported.clear()
        self._flagged, self._again = None, []
        self._restore(target, decision.skip_until - 1 + ahead)
        # The row is written first. If the run is killed before the checkpoint is
        # complete, it resumes from an earlier batch: then the row is dropped, and
        # written again after the next rewind.
        row = {"batch": self.batch, "rewind/from": reported, "rewind/to": self.step}
        self._write(reported, row)
        self._save()
