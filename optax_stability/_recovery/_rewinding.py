"""Decides when to go back to a checkpoint, to which one, and which batches to skip.

*Problem*: once the parameters are bad, skipping no longer helps: the run stays where it
diverged. PaLM went back to a checkpoint some 100 steps before each spike and skipped
the 200 to 500 batches around it; the same batches did no harm to other parameters.

*Where*: on the host, in the training loop, from the metrics that are logged anyway.

*Cost*: a median and a minimum of a few numbers per step; one number per step is kept,
for 20·``steps_back`` + 2·``patience`` steps, and one more for each that is undone.

*Source*: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", arXiv
2204.02311, section 5.1. The rule that detects the divergence is ours.
"""

import bisect
import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from optax_stability._core import _validate


class Decision(NamedTuple):
    """What the loop should do after a step.

    Attributes:
      action: ``"continue"``, ``"rewind"`` or ``"stop"``.
      restore_step: with ``"rewind"``, restore the newest checkpoint not after this
        step.
      skip_until: with ``"rewind"``, the step whose batch comes next, in the step
        numbers from before the rewind.
      reason: one sentence for the log; empty with ``"continue"``.
    """

    action: Literal["continue", "rewind", "stop"]
    restore_step: int | None = None
    skip_until: int | None = None
    reason: str = ""


_CONTINUE = Decision("continue")
_T = TypeVar("_T")


class RewindPolicy:
    """Rewinds a run whose loss has risen and stays high.

    **Rule**, for the losses lₜ of the steps that count, with non-finite ones as ∞::

      medₜ = median of the last ``patience`` losses
      refₜ = lowest med of the 10·steps_back steps before t, or what was reached by
             step t before a rewind undid it, whichever is lower
      diverged      if medₜ > refₜ + ``rise``
      onset         the first of these losses that is above ref + rise
      restore_step  = max(0, onset − 1 − ``steps_back``)
      skip_until    = max(restore_step + 1 + ``skip_batches``, t + 1)

    **Guarantees**

    * A rise that ends after less than half of ``patience`` steps never triggers: it is
      left to ``spike_guard``.
    * A lasting rise by more than ``rise`` is detected within ``patience`` steps, also
      right after a rewind; so is a loss that stays non-finite.
    * After a rewind, the losses are judged as if only the steps that count had been
      seen, except that what had been reached by each undone step is not forgotten: so
      trouble that returns is found again, wherever the run went back to.
    * No batch is used twice: neither those after the restored step, nor those that did
      the harm.
    * At most ``max_rewinds`` rewinds in a row. The next divergence is ``"stop"``,
      unless it comes more than ``steps_back + skip_batches`` steps after the last one.

    **Edge cases**

    * Until there are ``patience`` losses, no medians are compared; only non-finite
      losses, more than half of ``patience``, count as a divergence.
    * Rewinds that go back by more than 10·steps_back + patience steps in all, without
      progress in between, reach losses that are no longer kept: those are missing.
    * Losses are kept with seven digits.
    * A slow rise over thousands of steps raises ref as well, and is no divergence.
    * A lasting change of the data that raises the loss by ``rise`` looks like a
      divergence, also after each rewind: in the end the action is ``"stop"``. Then
      increase ``rise``, or set ``max_rewinds=0`` and ignore the decision.

    Args:
      steps_back: how far before the onset to go back, in steps.
      skip_batches: how many batches to skip, counted from the restored step.
      max_rewinds: rewinds in a row; 0 stops at the first divergence.
      rise: increase that counts as a divergence, in units of the loss (nats).
      patience: number of losses in the median, at least 2.
      metric: name of the loss in the metrics given to :meth:`update`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    Example:
      A run of 60 steps whose batches 21 to 24 do lasting harm:

      >>> policy = RewindPolicy(steps_back=5, skip_batches=10, patience=4)
      >>> saved, loss, step, ahead, log = {0: 3.0}, 3.0, 0, 0, []
      >>> while step < 60:
      ...     step += 1
      ...     loss += 1.0 if 21 <= step + ahead <= 24 else -0.01  # trains on a batch
      ...     decision = policy.update(step, {"loss": loss})
      ...     if decision.action == "rewind":
      ...         restored = max(s for s in saved if s <= decision.restore_step)
      ...         log.append((step, restored, decision.skip_until))
      ...         ahead += decision.skip_until - (restored + 1)
      ...         step, loss = restored, saved[restored]
      ...     elif step % 5 == 0:
      ...         saved[step] = loss
      >>> log, round(loss, 2)
      ([(23, 15, 26)], 2.4)

    References:
      Chowdhery et al. 2022, arXiv 2204.02311, section 5.1.
    """

    def __init__(
        self,
        steps_back: int = 100,
        skip_batches: int = 200,
        max_rewinds: int = 3,
        *,
        rise: float = 0.5,
        patience: int = 16,
        metric: str = "loss",
    ):
        """Checks the settings and starts without any losses."""
        if not isinstance(metric, str):
            raise TypeError(f"metric must be a name such as 'loss', got {metric!r}.")
        _validate.check_count("steps_back", steps_back, 1, "it counts steps")
        _validate.check_count("skip_batches", skip_batches, 1, "it counts steps")
        _validate.check_count("max_rewinds", max_rewinds, 0, "0 stops at once")
        _validate.check_count("patience", patience, 2, "it counts steps")
        _validate.check_interval("rise", rise, "(0, inf)", "it is in units of the loss")
        self._steps_back, self._skip_batches = steps_back, skip_batches
        self._max_rewinds, self._rise, self._metric = max_rewinds, rise, metric
        self._patience, self._window = patience, 10 * steps_back
        # The steps that count, oldest first, and their losses; the newest of them that
        # have enough losses before them also have a median.
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._medians: list[float] = []
        # The lowest median that had been reached by each step that was undone.
        self._reached: dict[int, float] = {}
        self._rewinds, self._last_divergence = 0, 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> Decision:
        """Records the loss of a step and decides what to do next.

        Args:
          step: the step that was taken, from 1. It grows from call to call; after a
            rewind it continues from the restored step.
          metrics: mapping with the loss under ``metric``, as a number of any type.

        Raises:
          ValueError: the loss is missing.
        """
        loss = self._read(metrics)
        self._undo_from(step)
        if step > self._last_divergence + self._steps_back + self._skip_batches:
            self._rewinds = 0
        reference = min(self._lowest(step), self._reached.get(step, math.inf))
        self._append(step, loss)
        median = self._median()
        if median is None:
            return _CONTINUE
        limit = reference + self._rise
        if median > limit or median == math.inf:
            return self._diverged(step, median, limit)
        return _CONTINUE

    def get_state(self) -> dict[str, Any]:
        """The state as plain numbers for ``json``, to be saved in checkpoints."""
        return {
            "steps": self._steps.copy(),
            "losses": [x if math.isfinite(x) else None for x in self._losses],
            "reached": [list(pair) for pair in self._reached.items()],
            "rewinds": self._rewinds,
            "last": self._last_divergence,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`get_state`; the decisions are then the same."""
        self._steps, self._losses, self._medians = [], [], []
        for step, loss in zip(state["steps"], state["losses"], strict=True):
            self._append(step, math.inf if loss is None else loss)
        self._reached = dict(state["reached"])
        self._rewinds, self._last_divergence = state["rewinds"], state["last"]

    def _read(self, metrics: Mapping[str, Any]) -> float:
        if self._metric not in metrics:
            known = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(
                f"metrics has no {self._metric!r}, but {known}; give the loss, or name "
                "it with metric=."
            )
        loss = float(metrics[self._metric])
        # As it is saved: a restored state decides as the one that was saved.
        return float(f"{loss:.7g}") if math.isfinite(loss) else math.inf

    def _undo_from(self, step: int) -> None:
        """Forgets this step and all later ones, but for what had been reached."""
        first = bisect.bisect_left(self._steps, step)
        for undone in self._steps[first:]:
            level = min(self._lowest(undone + 1), self._reached.get(undone, math.inf))
            if level < math.inf:
                self._reached[undone] = level
        count = len(self._steps) - first
        del self._steps[first:], self._losses[first:]
        del self._medians[max(0, len(self._medians) - count) :]

    def _append(self, step: int, loss: float) -> None:
        self._steps.append(step)
        self._losses.append(loss)
        if len(self._losses) >= self._patience:
            self._medians.append(statistics.median(self._recent(self._losses)))
        memory = 2 * (self._window + self._patience)
        kept_after = step - memory
        for undone in [x for x in self._reached if not -memory < x - step <= memory]:
            del self._reached[undone]
        old = bisect.bisect_right(self._steps, kept_after)
        del self._steps[:old], self._losses[:old]
        # A median counts only if all its losses are kept.
        known = max(0, len(self._losses) - self._patience + 1)
        del self._medians[: len(self._medians) - known]

    def _recent(self, values: list[_T]) -> list[_T]:
        return values[-self._patience :]

    def _lowest(self, step: int) -> float:
        """The lowest median of the window before a step; ∞ without any."""
        without = len(self._steps) - len(self._medians)
        first = bisect.bisect_left(self._steps, step - self._window) - without
        end = bisect.bisect_left(self._steps, step) - without
        return min(self._medians[max(0, first) : max(0, end)], default=math.inf)

    def _median(self) -> float | None:
        """Median of the last losses; None while there are too few."""
        if self._medians:
            return self._medians[-1]
        many = self._recent(self._losses).count(math.inf) > self._patience / 2
        return math.inf if many else None

    def _diverged(self, step: int, median: float, limit: float) -> Decision:
        recent = zip(self._recent(self._steps), self._recent(self._losses), strict=True)
        onset = next(at for at, loss in recent if loss > limit or loss == math.inf)
        reason = f"not finite since step {onset}"
        if math.isfinite(median):
            low = limit - self._rise
            above = f"{median - low:.2g} above the recent minimum"
            reason = f"at {median:.4g} since step {onset}, {above}"
        self._last_divergence = max(self._last_divergence, step)
        if self._rewinds >= self._max_rewinds:
            reason = f"{self._metric} is {reason}, after {self._rewinds} rewinds"
            return Decision("stop", reason=reason)
        self._rewinds += 1
        restore = max(0, onset - 1 - self._steps_back)
        skip_until = max(restore + 1 + self._skip_batches, step + 1)
        return Decision("rewind", restore, skip_until, f"{self._metric} is {reason}")
