"""Checkpoints of a run, through Orbax: written in the background, atomically.

A checkpoint is the state, a pytree of arrays, and its *progress*: a dict of plain
numbers and text with ``step``, the steps taken, and ``batch``, the batches drawn. The
two differ after a rewind: the step number goes back, the batch number never does. So
checkpoints are numbered by batch, and a run always resumes from the newest one,
whenever the process was killed.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

Progress = dict[str, Any]


def select_checkpoints(found: Iterable[Progress], keep: int) -> list[Progress]:
    """Selects the checkpoints that the run still needs, newest first.

    These are the newest, to resume from, the ``keep`` newest regular ones, and the
    best, which has the lowest finite ``eval/loss``. Checkpoints of steps that a rewind
    has undone are left out. So is an ``interim`` checkpoint once there is a newer one:
    otherwise a run that was stopped could rewind to more checkpoints than one that was
    not.
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
class _Policy(policies.PreservationPolicy):
    """:func:`select_checkpoints` as the policy that Orbax applies after every save."""

    keep: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: Any,
    ) -> list[bool]:
        del context
        found = [each.metrics for each in checkpoints if each.metrics]
        batches = {each["batch"] for each in select_checkpoints(found, self.keep)}
        return [each.step in batches for each in checkpoints]


class Checkpoints:
    """The newest states of a run, and the one with the lowest held-out loss."""

    def __init__(self, folder: Path, keep: int = 5, *, read_only: bool = False):
        """Opens or creates the folder.

        Args:
          folder: holds one folder per checkpoint.
          keep: how many of the newest to keep; the best is kept as well.
          read_only: only load, from a folder where a run may be writing. Otherwise
            incomplete checkpoints there are deleted.
        """
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            # Orbax stores our progress as its metrics, and only if best_fn is given.
            best_fn=lambda progress: progress["batch"],
            preservation_policy=_Policy(keep),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: Any, progress: Progress) -> None:
        """Copies the state and writes it in the background.

        A finite ``eval/loss`` in the progress makes it a candidate for the best. Once
        it is written, checkpoints that are no longer needed are deleted. A checkpoint
        that exists is not written again.
        """
        if progress["batch"] in self._manager.all_steps():
            self._delete_leftovers()
            return
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state))
        self._manager.save(progress["batch"], args=parts, metrics=progress)

    def _delete_leftovers(self) -> None:
        """Deletes checkpoints that a killed process did not delete in time."""
        needed = {each["batch"] for each in self.available()}
        for batch in set(self._manager.all_steps()) - needed:
            self._manager.delete(batch)

    def available(self) -> list[Progress]:
        """The progress of every checkpoint that the run still needs, newest first."""
        self._manager.wait_until_finished()
        found = map(self._manager.metrics, self._manager.all_steps())
        # None if a process was killed while it deleted the checkpoint.
        return select_checkpoints(filter(None, found), self._keep)

    def load(
        self,
        progress: Progress,
        like: Any = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Any:
        """Loads the state of one checkpoint.

        Args:
          progress: its entry in :meth:`available`.
          like: a state whose structure and shardings the result has; None: nested
            dicts of arrays, as they were written.
          sharding: one sharding for all arrays, instead of those of ``like``.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        if sharding is not None:
            shapes = jax.tree.map(lambda shape: shape.update(sharding=sharding), shapes)
        only = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._manager.restore(progress["batch"], args=only)["state"]

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()
