"""Says when to go back to a checkpoint, to which, and which batches to leave out.

*Problem*: once the parameters are bad, skipping no longer helps: the run stays where it
diverged. PaLM went back to a checkpoint some 100 steps before each spike and left out
the 200 to 500 batches around it; the same batches did no harm to other parameters.

*Where*: on the host, in the loop, fed with the numbers that are logged anyway.

*Cost*: a median of a few numbers per step.

*Source*: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", arXiv
2204.02311, section 5.1. The rule that sees the divergence is ours.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from optax_stability._core import _validate


class Decision(NamedTuple):
    """What the loop should do after a step.

    Attributes:
      action: ``"continue"``, ``"rewind"`` or ``"stop"``.
      restore_step: with ``"rewind"``, restore the newest checkpoint not after it.
      skip_until: with ``"rewind"``, the step, as steps were counted before the rewind,
        whose batch comes next.
      reason: one sentence for the log; empty with ``"continue"``.
    """

    action: Literal["continue", "rewind", "stop"]
    restore_step: int | None = None
    skip_until: int | None = None
    reason: str = ""


_CONTINUE = Decision("continue")


class RewindPolicy:
    """Rewinds a run whose loss has risen and stays there.

    **Rule**, for the losses lₜ, those that are not finite counted as ∞::

      medₜ = median of the last ``patience`` losses
      ref  = lowest med of the last 10·steps_back steps
      diverged      if medₜ > ref + ``rise``
      onset         the first of these losses that is above ref + rise
      restore_step  = max(0, onset − 1 − ``steps_back``)
      skip_until    = max(restore_step + 1 + ``skip_batches``, t + 1)

    **Guarantees**

    * What is over after less than half of ``patience`` steps never triggers: that is
      for ``spike_guard``, or for nobody.
    * A rise for good by more than ``rise`` is found within ``patience`` steps; so is a
      loss that is no number for good.
    * No batch is trained on again: neither what was seen after the step that is
      restored, nor what did the harm.
    * At most ``max_rewinds`` in a row. The next divergence is ``"stop"``, unless the
      run had gone ``steps_back + skip_batches`` steps past the last one by then.

    **Edge cases**

    * Until there are ``patience`` losses, nothing is compared; only half of them not
      being finite counts.
    * A rise over thousands of steps is followed, and is no divergence.
    * A change of the data that raises the loss by ``rise`` for good looks like a
      divergence, after a rewind as before: in the end it is ``"stop"``. Raise ``rise``
      then, or set ``max_rewinds=0`` and ignore what it says.

    Args:
      steps_back: how far before the onset to go back, in steps.
      skip_batches: how many batches to leave out from the step restored on.
      max_rewinds: rewinds in a row; 0 stops at the first divergence.
      rise: what is too much, in units of the loss (nats).
      patience: how many losses must agree, at least 2.
      metric: name of the loss in what :meth:`update` is given.

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
        """Has seen nothing yet."""
        _validate.check_count("steps_back", steps_back, 1, "it counts steps")
        _validate.check_count("skip_batches", skip_batches, 1, "it counts steps")
        _validate.check_count("max_rewinds", max_rewinds, 0, "0 is to stop at once")
        _validate.check_count("patience", patience, 2, "it counts steps")
        _validate.check_interval("rise", rise, "(0, inf)", "it is in units of the loss")
        self._steps_back, self._skip_batches = steps_back, skip_batches
        self._max_rewinds, self._rise, self._metric = max_rewinds, rise, metric
        self._patience = patience
        self._losses: deque[float] = deque(maxlen=patience)
        # Medians that are lower than all before them in reach, with their steps: the
        # first is the lowest, and each that follows is the lowest of what is younger.
        self._lowest: deque[tuple[int, float]] = deque()
        self._rewinds, self._last = 0, 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> Decision:
        """Learns what a step measured, and says how to go on.

        Args:
          step: the step that was taken, from 1. It grows by one from call to call, but
            after a rewind goes on behind the step that was restored.
          metrics: holds the loss under ``metric``, as anything that is a number.

        Raises:
          ValueError: the loss is not there.
        """
        loss = self._read(metrics)
        self._losses.append(loss if math.isfinite(loss) else math.inf)
        # After a rewind: what lies ahead was another run.
        while self._lowest and self._lowest[-1][0] >= step:
            self._lowest.pop()
        while self._lowest and self._lowest[0][0] < step - 10 * self._steps_back:
            self._lowest.popleft()
        if step > self._last + self._steps_back + self._skip_batches:
            self._rewinds = 0
        limit = self._lowest[0][1] + self._rise if self._lowest else math.inf
        median = self._median()
        if median is None:
            return _CONTINUE
        if median > limit or median == math.inf:
            return self._diverged(step, median, limit)
        while self._lowest and self._lowest[-1][1] >= median:
            self._lowest.pop()
        self._lowest.append((step, median))
        return _CONTINUE

    def get_state(self) -> dict[str, Any]:
        """All it has learned, as plain numbers for ``json``: keep it in checkpoints."""
        return {
            "losses": [x if math.isfinite(x) else None for x in self._losses],
            "lowest": [list(each) for each in self._lowest],
            "rewinds": self._rewinds,
            "last": self._last,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`get_state` gave, to decide as that policy would."""
        losses = (math.inf if x is None else x for x in state["losses"])
        self._losses = deque(losses, maxlen=self._patience)
        self._lowest = deque((step, median) for step, median in state["lowest"])
        self._rewinds, self._last = state["rewinds"], state["last"]

    def _read(self, metrics: Mapping[str, Any]) -> float:
        if self._metric not in metrics:
            known = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(
                f"metrics has no {self._metric!r}, but {known}; give the loss, or name "
                "it with metric=."
            )
        return float(metrics[self._metric])

    def _median(self) -> float | None:
        """Of the last losses; None while there are too few to tell."""
        if len(self._losses) == self._patience:
            return statistics.median(self._losses)
        many = self._losses.count(math.inf) > self._patience / 2
        return math.inf if many else None

    def _diverged(self, step: int, median: float, limit: float) -> Decision:
        first = next(
            i for i, x in enumerate(self._losses) if x > limit or x == math.inf
        )
        onset = step - len(self._losses) + 1 + first
        reason = f"no number since step {onset}"
        if math.isfinite(median):
            low = limit - self._rise
            above = f"{median - low:.2g} above the lowest of late"
            reason = f"at {median:.4g} since step {onset}, {above}"
        self._last = max(self._last, step)
        if self._rewinds >= self._max_rewinds:
            reason = f"{self._metric} is {reason}, after {self._rewinds} rewinds"
            return Decision("stop", reason=reason)
        self._rewinds += 1
        self._losses.clear()
        restore = max(0, onset - 1 - self._steps_back)
        skip_until = max(restore + 1 + self._skip_batches, step + 1)
        return Decision("rewind", restore, skip_until, f"{self._metric} is {reason}")
