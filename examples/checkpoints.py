"""Checkpoints of a run, through Orbax: written in the background, whole or not at all.

A checkpoint is the state, a pytree of arrays, and its *progress*: a dict of plain
numbers and text with ``step``, the steps taken, and ``batch``, the batches drawn. The
two differ after a rewind: the steps go back, the batches never do. So checkpoints are
filed by batch, and the newest is always the one to go on from, whenever the process is
killed.
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


def those_that_count(found: Iterable[Progress], keep: int) -> list[Progress]:
    """Which checkpoints matter to a run from here on, newest first.

    They are the newest, to go on from, the ``keep`` newest and the best, which has the
    lowest finite ``eval/loss``. What a rewind has gone back past does not count, nor
    does, once there is a newer one, what is marked ``interim``: a run that was stopped
    would else have more to go back to than one that was not.
    """
    line: list[Progress] = []
    for each in sorted(found, key=lambda progress: progress["batch"], reverse=True):
        if not line or each["step"] < line[-1]["step"]:
            line.append(each)
    regular = [each for each in line if not each.get("interim")]
    kept = line[:1] + regular[:keep]
    losses = [each.get("eval/loss", math.nan) for each in regular]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        kept.append(regular[losses.index(min(finite))])
    return [each for each in line if each in kept]


@dataclasses.dataclass(frozen=True)
class _Policy(policies.PreservationPolicy):
    """The same rule, as Orbax asks for it after every save."""

    keep: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: Any,
    ) -> list[bool]:
        del context
        found = [each.metrics for each in checkpoints if each.metrics]
        batches = {each["batch"] for each in those_that_count(found, self.keep)}
        return [each.step in batches for each in checkpoints]


class Checkpoints:
    """The newest states of a run, and the one with the lowest held-out loss."""

    def __init__(self, folder: Path, keep: int = 5, *, read_only: bool = False):
        """Opens or makes the folder.

        Args:
          folder: holds one folder per checkpoint.
          keep: how many of the newest to keep; the best is kept beside them.
          read_only: for a folder where a run may be writing, and only to load from.
            Otherwise what is half written there is cleared away.
        """
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            # Without it the metrics, which our progress is to Orbax, are not written.
            best_fn=lambda progress: progress["batch"],
            preservation_policy=_Policy(keep),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: Any, progress: Progress) -> None:
        """Copies the state and writes it in the background.

        A finite ``eval/loss`` in the progress makes it a candidate for the best. Once
        it is written, what does not count any more is deleted. What is there already
        is not written again.
        """
        if progress["batch"] in self._manager.all_steps():
            self._delete_leftovers()
            return
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state))
        self._manager.save(progress["batch"], args=parts, metrics=progress)

    def _delete_leftovers(self) -> None:
        """Of a process that was killed before it could."""
        count = {each["batch"] for each in self.line()}
        for batch in set(self._manager.all_steps()) - count:
            self._manager.delete(batch)

    def line(self) -> list[Progress]:
        """The progress of every checkpoint that counts, newest first."""
        self._manager.wait_until_finished()
        found = map(self._manager.metrics, self._manager.all_steps())
        # It is missing where a process was killed while it deleted the checkpoint.
        return those_that_count(filter(None, found), self._keep)

    def load(
        self,
        progress: Progress,
        like: Any = None,
        lie: jax.sharding.Sharding | None = None,
    ) -> Any:
        """The state of one of :meth:`line`.

        Args:
          progress: which.
          like: a state of the same structure, whose shardings it gets; None: nested
            dicts of arrays, as they were written.
          lie: how all arrays are to lie instead.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        if lie is not None:
            shapes = jax.tree.map(lambda shape: shape.update(sharding=lie), shapes)
        only = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._manager.restore(progress["batch"], args=only)["state"]

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.close()

    def __enter__(self) -> Self:
        """Is its own context."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()
