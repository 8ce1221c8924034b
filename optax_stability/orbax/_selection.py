"""Selects the checkpoints that a run still needs."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

Progress = dict[str, Any]


def select_checkpoints(found: Iterable[Progress], keep: int) -> list[Progress]:
    """Selects the checkpoints that the run still needs, newest first.

    These are the newest, to resume from, the ``keep`` newest regular ones, and the
    best, which has the lowest finite ``eval/loss``. Checkpoints of steps that a rewind
    has undone are left out. So is an ``interim`` checkpoint once there is a newer one:
    otherwise a run that was stopped could rewind to more checkpoints than one that was
    not.

    Args:
      found: the progress of each checkpoint, in any order; see :class:`Checkpoints`.
      keep: how many of the newest regular ones to keep.

    Example:
      >>> found = [{"step": n, "batch": n, "eval/loss": abs(n - 3)} for n in range(9)]
      >>> [each["batch"] for each in select_checkpoints(found, keep=2)]
      [8, 7, 3]
    """
    current: list[Progress] = []
    for each in sorted(found, key=lambda progress: progress["batch"], reverse=True):
        if not current or each["step"] < current[-1]["step"]:
            current.append(each)
    regular = [each for each in current if not each.get("interim")]
    kept = current[:1] + regular[:keep]
    losses = [each.get("eval/loss", math.nan) for each in regular]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        kept.append(regular[losses.index(min(finite))])
    return [each for each in current if each in kept]


@dataclasses.dataclass(frozen=True)
class Preserve(policies.PreservationPolicy):
    """:func:`select_checkpoints` as the policy that Orbax applies after every save."""

    keep: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: Any,
    ) -> list[bool]:
        """Whether to preserve each of the checkpoints."""
        del context
        found = [each.metrics for each in checkpoints if each.metrics]
        batches = {each["batch"] for each in select_checkpoints(found, self.keep)}
        return [each.step in batches for each in checkpoints]
