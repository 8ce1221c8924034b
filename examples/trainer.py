"""The training loop of a run that can be killed, stopped, resumed and rewound.

It does not depend on the model: a :class:`Run` trains and evaluates. The loop reports
the metrics one step late, saves checkpoints, and returns to an older checkpoint when
the loss has diverged. A batch that was skipped is looked at again, and trained on after
all if nothing is wrong with it. A run that is killed at any moment and started again
continues bit for bit as if it had not been killed.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flagged
import jax
import writers
from command import FailedError
from flagged import Drawn, Row
from pace import Pace

import optax_stability as ost
from optax_stability.orbax import Checkpoints

Metrics = dict[str, jax.Array]
Progress = dict[str, Any]


class DivergedError(FailedError):
    """The loss diverged, and returning to older checkpoints did not help."""


class NotSavedError(FailedError):
    """The last checkpoint of the run could not be saved."""


def _evaluation(row: dict[str, Any]) -> Row:
    """The entries of a row that were measured on the held-out part."""
    return {key: x for key, x in row.items() if key.startswith("eval/")}


class Run(Protocol):
    """The interface of a run.

    Attributes:
      state: a pytree of arrays; training depends on it and on the two counts only.
      step: number of steps taken.
      batch: number of batches drawn; larger than ``step`` after a rewind.
      again: the batches to draw once more before the next new one, by their position
        in the data.
      repeated: number of batches that were drawn once more.
      tokens_per_step: tokens in one batch.
      flops_per_token: FLOPs of a step per token, forward and backward.
    """

    state: Any
    step: int
    batch: int
    again: list[int]
    repeated: int
    tokens_per_step: int
    flops_per_token: float

    def advance(self) -> tuple[Drawn, Metrics]:
        """Trains on the next batch and counts it; the metrics may not be ready yet."""
        ...

    def examine(self, drawn: Drawn) -> list[flagged.Window]:
        """The windows of a batch, with their losses under the current parameters."""
        ...

    def evaluate(self) -> Row:
        """Evaluates the model; the names begin with ``eval/``."""
        ...


class Schedule(NamedTuple):
    """The schedule of the loop, in steps.

    Attributes:
      steps: last step of the run.
      eval_every: steps from one evaluation to the next.
      checkpoint_every: steps from one checkpoint to the next.
      histogram_every: steps from one set of histograms to the next; 0 for none.
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    histogram_every: int = 0


class Trainer:
    """Trains a run to its end.

    Attributes:
      row: the measurements of the last step and of the last evaluation.
    """

    def __init__(
        self,
        schedule: Schedule,
        run: Run,
        saved: Checkpoints,
        writer: writers.Writer,
        about: dict[str, Any],
        policy: ost.RewindPolicy | None,
        kept: Path | None = None,
    ):
        """Starts at the current step of the run.

        Args:
          schedule: when to evaluate, save and stop.
          run: the run to train.
          saved: the checkpoints, to save to and to rewind to.
          writer: receives every row of numbers.
          about: plain values that identify the run; stored in every checkpoint.
          policy: decides when to rewind; None: never.
          kept: folder for the batches of flagged steps; None: they are not kept.
        """
        self._schedule, self._run, self._saved = schedule, run, saved
        self._writer, self._about = writer, about
        self._policy, self._kept = policy, kept
        # A flagged step whose batch is evaluated again after the next step.
        self._flagged: tuple[Drawn, Row] | None = None
        self._pace = Pace(run.tokens_per_step, run.flops_per_token)
        self._unreported: deque[tuple[Drawn, Metrics]] = deque()
        # The batch after which the evaluation in self.row was made.
        self._evaluated: int | None = None
        self.row: Row = {}

    def _progress(self) -> Progress:
        progress: Progress = {"step": self._run.step, "batch": self._run.batch}
        evaluation = _evaluation(self.row)
        if self._evaluated != self._run.batch:
            evaluation = {}  # It belongs to an older state, which may have been better.
        if self._policy is not None:
            progress["policy"] = self._policy.get_state()
        progress |= {"again": list(self._run.again), "repeated": self._run.repeated}
        if self._flagged is not None:
            drawn, row = self._flagged
            progress["flagged"] = [list(drawn), row]
        return self._about | evaluation | progress

    def resume(self, progress: Progress) -> None:
        """Resumes the run from a checkpoint."""
        run = self._run
        self._restore(progress, progress["batch"])
        run.again, run.repeated = progress["again"], progress["repeated"]
        if "flagged" in progress:
            drawn, row = progress["flagged"]
            self._flagged = Drawn(*drawn), row
        if self._policy is not None and "policy" in progress:
            self._policy.set_state(progress["policy"])

    def _restore(self, progress: Progress, batch: int) -> None:
        """Loads a checkpoint, and continues after the given batch."""
        run = self._run
        run.state = self._saved.load(progress, like=run.state)
        run.step, run.batch = progress["step"], batch
        self.row, self._evaluated = _evaluation(progress), batch

    def _save(self, *, interim: bool = False) -> None:
        """Saves a checkpoint in the background.

        An interim checkpoint is only for resuming; the run never rewinds to it.
        """
        mark = {"interim": True} if interim else {}
        self._saved.save(self._run.state, self._progress() | mark)
        self._pace.pause()

    def train(self, stop: ost.StopRequest) -> None:
        """Trains up to the last step, or until a stop is requested, and saves.

        Raises:
          DivergedError: the loss diverged more often than the policy allows, or is not
            finite at the end.
          NotSavedError: the last checkpoint could not be saved, at the second attempt.
        """
        schedule, run = self._schedule, self._run
        if self._evaluated is None:  # a new run
            self.row = {"batch": run.batch, "tokens": 0}
            self._evaluate()
        self._save()
        stops = interim = False
        while run.step < schedule.steps and not stops:
            self._unreported.append(run.advance())
            self._saved.poll()
            stops, last = stop.due(), run.step == schedule.steps
            evaluates = last or run.step % schedule.eval_every == 0
            regular = last or run.step % schedule.checkpoint_every == 0
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
        self._check_end(stopped=run.step < schedule.steps)

    def _check_saved(self) -> None:
        reason = self._saved.wait()
        if reason is not None:
            newest = next((each["step"] for each in self._saved.available()), 0)
            remedy = "make room, and give the same command again"
            raise NotSavedError(
                f"step {self._run.step} could not be saved ({reason}): the newest "
                f"checkpoint is that of step {newest}; {remedy}"
            )

    def _check_end(self, *, stopped: bool) -> None:
        """A run that ends in NaN has failed."""
        end = self.row.get("eval/loss", 0.0)
        if not stopped and not math.isfinite(end):
            remedy = "lower --learning-rate, or train without --baseline"
            raise DivergedError(
                f"the run ends with a held-out loss that is not finite; {remedy}"
            )

    def _report_until(self, *, late: int) -> ost.Decision:
        """Reports all unreported steps but the last ``late``."""
        decision = ost.Decision("continue")
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
        run = self._run
        if self._flagged is None:
            return
        drawn, row = self._flagged
        if drawn.step < run.step or run.step == self._schedule.steps:
            self._flagged = None
            found = flagged.recheck(run, drawn, row, self._kept)
            tokens = run.step * run.tokens_per_step
            self._writer.write(run.step, {"batch": run.batch, "tokens": tokens} | found)
            skipped = row.get("skip/skipped")
            if found["recheck/verdict"] == flagged.MACHINE and skipped:
                run.again.append(drawn.position)

    def _report(self, drawn: Drawn, metrics: Metrics) -> ost.Decision:
        """Logs a finished step, and returns the decision of the policy."""
        step, batch = drawn.step, drawn.batch
        found = jax.device_get(metrics)
        row: Row = {"batch": batch, "tokens": step * self._run.tokens_per_step}
        row |= {key: float(x) for key, x in found.items() if x.ndim == 0}
        row |= self._pace.step()
        self.row |= row
        self._writer.write(step, row)
        # The first step is the recorder's step 0, in which it measures.
        every = self._schedule.histogram_every
        if every and (step - 1) % every == 0:
            histograms = {key: x for key, x in found.items() if x.ndim}
            self._writer.write_histograms(step, histograms)
        if flagged.is_flagged(row):
            needed = sorted(flagged.NEEDED & row.keys())
            self._flagged = drawn, {key: row[key] for key in needed}
        # The policy ignores steps in an open branch, which may be taken back, and
        # probes, which were measured on the kept parameters.
        ignored = row.get("branch/mode") or row.get("branch/probed")
        if self._policy is None or ignored:
            return ost.Decision("continue")
        return self._policy.update(step, row)

    def _evaluate(self) -> None:
        evaluation = self._run.evaluate()
        self.row |= evaluation
        self._evaluated = self._run.batch
        at = {key: self.row[key] for key in ("batch", "tokens")}
        self._writer.write(self._run.step, at | evaluation)
        self._pace.pause()

    def _rewind(self, decision: ost.Decision) -> None:
        """Restores an older state, and skips the harmful batches."""
        if decision.restore_step is None or decision.skip_until is None:
            raise DivergedError(decision.reason)
        run = self._run
        regular = [each for each in self._saved.available() if not each.get("interim")]
        at = [each["step"] <= decision.restore_step for each in regular]
        first = at.index(True) if any(at) else -1  # The oldest.
        target = self._saved.first_whole(regular[first:])
        if target is None:
            problem = "there is no checkpoint to go back to"
            raise DivergedError(f"{decision.reason}, and {problem}")
        reported, ahead = run.step - len(self._unreported), run.batch - run.step
        self._unreported.clear()
        self._flagged, run.again = None, []
        self._restore(target, decision.skip_until - 1 + ahead)
        # The row is written first. If the run is killed before the checkpoint is
        # complete, it resumes from an earlier batch: then the row is dropped, and
        # written again after the next rewind.
        row = {"batch": run.batch, "rewind/from": reported, "rewind/to": run.step}
        self._writer.write(reported, row)
        self._save()
