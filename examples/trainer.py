"""The loop of a run that can be killed, stopped, resumed and sent back.

It knows nothing of models: a :class:`Run` trains and evaluates, this loop reports what
it says one step late, saves it, and goes back to a checkpoint when the loss has run
away. A run that was killed at any moment and is started again takes the course it would
have taken, bit for bit.
"""

from collections import deque
from typing import Any, NamedTuple, Protocol

import jax
import writers
from checkpoints import Checkpoints, Progress
from pace import Pace
from stopping import StopRequest

import optax_stability as ost

Metrics = dict[str, jax.Array]
Row = dict[str, float]


class DivergedError(Exception):
    """The loss ran away, and going back did not help."""


def _evaluation(row: dict[str, Any]) -> Row:
    """What of a row was measured on the held-out part."""
    return {key: x for key, x in row.items() if key.startswith("eval/")}


class Run(Protocol):
    """What the loop drives.

    Attributes:
      state: a pytree of arrays, all that training depends on but for the counts.
      step: steps taken.
      batch: batches drawn; more than steps after a rewind.
      tokens_per_step: of one batch.
      flops_per_token: of a step, forward and backward.
    """

    state: Any
    step: int
    batch: int
    tokens_per_step: int
    flops_per_token: float

    def advance(self) -> Metrics:
        """Trains on the next batch and counts; the metrics may be on their way."""
        ...

    def evaluate(self) -> Row:
        """Measures the model as it is, under names that begin with ``eval/``."""
        ...


class Schedule(NamedTuple):
    """When to do what, in steps.

    Attributes:
      steps: where the run ends.
      eval_every: from one evaluation to the next.
      checkpoint_every: from one checkpoint to the next.
      histogram_every: from one set of histograms to the next; 0 for none.
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    histogram_every: int = 0


class Trainer:
    """Takes a run to its end.

    Attributes:
      row: what the last step and the last evaluation measured.
    """

    def __init__(
        self,
        schedule: Schedule,
        run: Run,
        saved: Checkpoints,
        writer: writers.Writer,
        about: dict[str, Any],
        policy: ost.RewindPolicy | None,
    ):
        """Starts where the run is.

        Args:
          schedule: when to do what.
          run: what is trained.
          saved: where to save it, and to go back to.
          writer: takes every row of numbers.
          about: plain values that every checkpoint carries: what it is of.
          policy: says when to go back; None: never.
        """
        self._schedule, self._run, self._saved = schedule, run, saved
        self._writer, self._about = writer, about
        self._policy = policy
        self._pace = Pace(run.tokens_per_step, run.flops_per_token)
        self._waiting: deque[tuple[int, int, Metrics]] = deque()
        # What self.row says of the held-out part was measured after this batch.
        self._evaluated: int | None = None
        self.row: Row = {}

    def _progress(self) -> Progress:
        progress: Progress = {"step": self._run.step, "batch": self._run.batch}
        evaluation = _evaluation(self.row)
        if self._evaluated != self._run.batch:
            evaluation = {}  # It is of an older state, which may have been better.
        if self._policy is not None:
            progress["policy"] = self._policy.get_state()
        return self._about | evaluation | progress

    def resume(self, progress: Progress) -> None:
        """Takes the run up where a checkpoint left it."""
        self._restore(progress, progress["batch"])
        if self._policy is not None and "policy" in progress:
            self._policy.set_state(progress["policy"])

    def _restore(self, progress: Progress, batch: int) -> None:
        """Loads a checkpoint, to go on from it behind the given batch."""
        run = self._run
        run.state = self._saved.load(progress, like=run.state)
        run.step, run.batch = progress["step"], batch
        self.row, self._evaluated = _evaluation(progress), batch

    def _save(self, *, interim: bool = False) -> None:
        """Makes a checkpoint of the run as it is, in the background.

        An interim one is for going on from, and nothing to go back to.
        """
        mark = {"interim": True} if interim else {}
        self._saved.save(self._run.state, self._progress() | mark)
        self._pace.pause()

    def train(self, stop: StopRequest) -> None:
        """Goes to the last step, or to where it is asked to stop, and saves.

        Raises:
          DivergedError: the loss ran away once too often.
        """
        schedule, run = self._schedule, self._run
        if self._evaluated is None:  # It is new.
            self.row = {"batch": run.batch, "tokens": 0}
            self._evaluate()
        self._save()
        stops = False
        while run.step < schedule.steps and not stops:
            metrics = run.advance()
            self._waiting.append((run.step, run.batch, metrics))
            stops, last = stop.due(), run.step == schedule.steps
            evaluates = last or run.step % schedule.eval_every == 0
            regular = last or run.step % schedule.checkpoint_every == 0
            saves = regular or stops
            # One step late: the device has its next step before the host waits for it.
            decision = self._look(late=0 if evaluates or saves else 1)
            if decision.action != "continue":
                self._go_back(decision)
                continue
            if evaluates:
                self._evaluate()
            if saves:
                self._save(interim=not regular)

    def _look(self, *, late: int) -> ost.Decision:
        """Reports the steps that are waiting, but for the last ``late``."""
        decision = ost.Decision("continue")
        while len(self._waiting) > late and decision.action == "continue":
            decision = self._report(*self._waiting.popleft())
        return decision

    def _report(self, step: int, batch: int, metrics: Metrics) -> ost.Decision:
        """Logs a step that is finished, and asks whether to go on."""
        found = jax.device_get(metrics)
        row: Row = {"batch": batch, "tokens": step * self._run.tokens_per_step}
        row |= {key: float(x) for key, x in found.items() if x.ndim == 0}
        row |= self._pace.step()
        self.row |= row
        self._writer.write(step, row)
        # The first step is the recorder's step 0, at which it measures.
        every = self._schedule.histogram_every
        if every and (step - 1) % every == 0:
            histograms = {key: x for key, x in found.items() if x.ndim}
            self._writer.write_histograms(step, histograms)
        # What is in a branch may be taken back; a probe is of older parameters.
        undecided = row.get("branch/mode") or row.get("branch/probed")
        if self._policy is None or undecided:
            return ost.Decision("continue")
        return self._policy.update(step, row)

    def _evaluate(self) -> None:
        evaluation = self._run.evaluate()
        self.row |= evaluation
        self._evaluated = self._run.batch
        at = {key: self.row[key] for key in ("batch", "tokens")}
        self._writer.write(self._run.step, at | evaluation)
        self._pace.pause()

    def _go_back(self, decision: ost.Decision) -> None:
        """Restores an older state, and leaves out the batches that did the harm."""
        if decision.restore_step is None or decision.skip_until is None:
            raise DivergedError(decision.reason)
        run = self._run
        line = [each for each in self._saved.line() if not each.get("interim")]
        before = (each for each in line if each["step"] <= decision.restore_step)
        target = next(before, line[-1])  # Or the oldest there is.
        seen, ahead = run.step - len(self._waiting), run.batch - run.step
        self._waiting.clear()
        self._restore(target, decision.skip_until - 1 + ahead)
        # The row first. If the run is killed before the checkpoint is whole, it goes on
        # from an earlier batch, so the row is dropped, and comes again.
        row = {"batch": run.batch, "rewind/from": seen, "rewind/to": run.step}
        self._writer.write(seen, row)
        self._save()
