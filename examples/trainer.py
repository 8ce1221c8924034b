"""The training loop of a run that can be killed, stopped, resumed and rewound.

It does not depend on the model: a :class:`Run` trains and evaluates. The loop reports
the metrics one step late, saves checkpoints, and returns to an older checkpoint when
the loss has diverged. A run that is killed at any moment and started again continues
bit for bit as if it had not been killed.
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
    """The loss diverged, and returning to older checkpoints did not help."""


def _evaluation(row: dict[str, Any]) -> Row:
    """The entries of a row that were measured on the held-out part."""
    return {key: x for key, x in row.items() if key.startswith("eval/")}


class Run(Protocol):
    """The interface of a run.

    Attributes:
      state: a pytree of arrays; training depends on it and on the two counts only.
      step: number of steps taken.
      batch: number of batches drawn; larger than ``step`` after a rewind.
      tokens_per_step: tokens in one batch.
      flops_per_token: FLOPs of a step per token, forward and backward.
    """

    state: Any
    step: int
    batch: int
    tokens_per_step: int
    flops_per_token: float

    def advance(self) -> Metrics:
        """Trains on the next batch and counts it; the metrics may not be ready yet."""
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
    ):
        """Starts at the current step of the run.

        Args:
          schedule: when to evaluate, save and stop.
          run: the run to train.
          saved: the checkpoints, to save to and to rewind to.
          writer: receives every row of numbers.
          about: plain values that identify the run; stored in every checkpoint.
          policy: decides when to rewind; None: never.
        """
        self._schedule, self._run, self._saved = schedule, run, saved
        self._writer, self._about = writer, about
        self._policy = policy
        self._pace = Pace(run.tokens_per_step, run.flops_per_token)
        self._unreported: deque[tuple[int, int, Metrics]] = deque()
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
        return self._about | evaluation | progress

    def resume(self, progress: Progress) -> None:
        """Resumes the run from a checkpoint."""
        self._restore(progress, progress["batch"])
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

    def train(self, stop: StopRequest) -> None:
        """Trains up to the last step, or until a stop is requested, and saves.

        Raises:
          DivergedError: the loss diverged more often than the policy allows.
        """
        schedule, run = self._schedule, self._run
        if self._evaluated is None:  # a new run
            self.row = {"batch": run.batch, "tokens": 0}
            self._evaluate()
        self._save()
        stops = False
        while run.step < schedule.steps and not stops:
            metrics = run.advance()
            self._unreported.append((run.step, run.batch, metrics))
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
                self._save(interim=not regular)

    def _report_until(self, *, late: int) -> ost.Decision:
        """Reports all unreported steps but the last ``late``."""
        decision = ost.Decision("continue")
        while len(self._unreported) > late and decision.action == "continue":
            decision = self._report(*self._unreported.popleft())
        return decision

    def _report(self, step: int, batch: int, metrics: Metrics) -> ost.Decision:
        """Logs a finished step, and returns the decision of the policy."""
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
        older = (each for each in regular if each["step"] <= decision.restore_step)
        target = next(older, regular[-1])  # or the oldest checkpoint
        reported, ahead = run.step - len(self._unreported), run.batch - run.step
        self._unreported.clear()
        self._restore(target, decision.skip_until - 1 + ahead)
        # The row is written first. If the run is killed before the checkpoint is
        # complete, it resumes from an earlier batch: then the row is dropped, and
        # written again after the next rewind.
        row = {"batch": run.batch, "rewind/from": reported, "rewind/to": run.step}
        self._writer.write(reported, row)
        self._save()
