"""Checkpoints of a run, through Orbax: written in the background, atomically, verified.

*Problem*: runs die at night. A disk that is full while a checkpoint is written ends the
run; a newest checkpoint that is damaged ends it when it is started again.

*Where*: on the host, in the training loop, beside
:class:`optax_stability.RewindPolicy`.

*Cost*: that of Orbax, and reading each checkpoint once more, in the background.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from optax_stability._core import _validate
from optax_stability._recovery._checksums import (
    CHECKSUMS,
    find_damage,
    write_checksums,
)
from optax_stability.orbax._lock import hold
from optax_stability.orbax._selection import Preserve, Progress, select_checkpoints

# What Orbax and TensorStore raise when something is wrong on disk.
_FAILURES = (OSError, ValueError, RuntimeError)


def _reason(error: Exception) -> str:
    """Why something on disk failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore puts the words of the system at the end: "…: No space left on device
    # [os_error_code='28']".
    first, *_ = str(error).splitlines() or [""]
    message, _, code = first.partition(" [os_error_code")
    return (message.rpartition(": ")[2] if code else first) or type(error).__name__


class Checkpoints:
    """The newest states of a run, and the one with the lowest held-out loss.

    A checkpoint is the state, a pytree of arrays, and its *progress*: a dict of plain
    numbers and text with ``step``, the steps taken, and ``batch``, the batches drawn.
    The two differ after a rewind: the step number goes back, the batch number never
    does. So checkpoints are numbered by batch, and a run always resumes from the newest
    one, whenever the process was killed.

    **Guarantees**

    * A process that is killed at any moment leaves only checkpoints that are complete.
    * Every file of a checkpoint has a checksum. :meth:`newest` reads all of them before
      anything is loaded, and moves a damaged checkpoint to a folder beside this one, so
      that the run goes on from the one before.
    * One process writes to a folder at a time. The operating system frees the folder of
      a process that dies, however it dies.
    * A save that fails (a full disk, a folder that was removed) deletes no checkpoint,
      leaves no part of its own, and ends no run: it is reported, and :meth:`wait` says
      whether the last one is on disk.

    **Edge cases**: a process that is killed after a checkpoint is complete, and before
    its checksums are, leaves one without, and so does a disk that is full just then: it
    is read as a whole to see that it can be.

    Args:
      folder: holds one folder per checkpoint.
      keep: how many of the newest to keep; the best is kept as well.
      read_only: only load, from a folder where a run may be writing. Otherwise
        incomplete checkpoints there are deleted.
      report: receives each sentence about a checkpoint that is damaged or could not be
        saved; by default it becomes a warning.

    Raises:
      BlockingIOError: another process writes to the folder; the message says which.
      OSError: the folder cannot be created or read.
      ValueError: ``keep`` is out of range, or something is saved with ``read_only``.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> state = {"w": jnp.ones(3)}
      >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as saved:
      ...     for step in range(4):
      ...         saved.save(state, {"step": step, "batch": step})
      ...     newest = saved.newest()
      ...     print(newest, saved.load(newest, like=state)["w"])
      {'step': 3, 'batch': 3} [1. 1. 1.]
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 5,
        *,
        read_only: bool = False,
        report: Callable[[str], object] = warnings.warn,
    ):
        """Opens or creates the folder."""
        _validate.check_count("keep", keep, 1, "it counts checkpoints")
        self.folder: Path = Path(folder).resolve()
        self._keep, self._read_only, self._report = keep, read_only, report
        # Waits for Orbax, and then writes the checksums.
        self._thread = ThreadPoolExecutor(1, "checksums")
        self._writing: tuple[int, Future[None]] | None = None
        self._failed: str | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._held = contextlib.ExitStack()
        if not read_only and jax.process_index() == 0:
            self._held.enter_context(hold(self.folder))
        with contextlib.ExitStack() as stack:
            stack.callback(self._held.close)
            self._open()
            stack.pop_all()

    def _open(self) -> None:
        self._remove_unreadable()
        if not self._read_only:
            options = ocp.CheckpointManagerOptions(
                # Orbax stores our progress as its metrics, but only with best_fn.
                best_fn=lambda progress: progress["batch"],
                preservation_policy=Preserve(self._keep),
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def _orbax(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise ValueError(
                "read_only=True opens a folder to load from; to save, open it without."
            )
        return self._manager

    # --- saving ---

    def save(self, state: Any, progress: Progress) -> None:
        """Copies the state and writes it in the background.

        A finite ``eval/loss`` in the progress makes it a candidate for the best. Once
        it is written, checkpoints that are no longer needed are deleted. A checkpoint
        that exists is not written again. A failure is reported, now or later.
        """
        self.wait()
        batch = progress["batch"]
        if batch in self._on_disk():
            self._failed = None
            self._delete_leftovers()
            return
        try:
            parts = ocp.args.Composite(state=ocp.args.StandardSave(state))
            self._orbax.save(batch, args=parts, metrics=progress, force=True)
        except _FAILURES as error:
            self._fail(batch, error)
            return
        self._writing = batch, self._thread.submit(self._finish, batch)

    def _finish(self, batch: int) -> None:
        """Waits for Orbax, and then writes the checksums."""
        self._orbax.wait_until_finished()
        folder = self.folder / str(batch)
        if jax.process_index() == 0 and folder.is_dir():
            # Without room for them the checkpoint is complete, and others were deleted.
            with contextlib.suppress(OSError):
                write_checksums(folder)

    def poll(self) -> None:
        """Reports a failure as soon as it is known, without waiting; call it often."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> str | None:
        """Waits until the last checkpoint is written; why it could not be, or None."""
        if self._writing is not None:
            (batch, finished), self._writing = self._writing, None
            try:
                finished.result()
                self._failed = None
            except _FAILURES as error:
                self._fail(batch, error)
        return self._failed

    def _fail(self, batch: int, error: Exception) -> None:
        self._failed = _reason(error)
        if jax.process_index() == 0:  # What was written takes space on a full disk.
            for path in self.folder.glob(f"{batch}*"):
                if path.name.partition(".")[0] == str(batch):
                    shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(*_FAILURES):
            # Orbax raises a failure once in every thread that waits for it.
            self._orbax.wait_until_finished()
        self._orbax.reload()
        self._report(
            f"checkpoint {batch} could not be saved: {self._failed}; those before it "
            "are kept, and the next one is another attempt"
        )

    def _delete_leftovers(self) -> None:
        """Deletes checkpoints that a killed process did not delete in time."""
        needed = {each["batch"] for each in self.available()}
        for batch in set(self._on_disk()) - needed:
            self._orbax.delete(batch)

    # --- loading ---

    def _on_disk(self) -> list[int]:
        """The batches of the checkpoints, whoever wrote or removed some of them."""
        names = (path.name for path in self.folder.glob("*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def available(self) -> list[Progress]:
        """The progress of every checkpoint that the run still needs, newest first."""
        return select_checkpoints(self._every(), self._keep)

    def _every(self) -> list[Progress]:
        """The progress of every checkpoint on disk."""
        self.wait()
        found = map(self._read_progress, self._on_disk())
        # None if a process was killed while it deleted the checkpoint.
        return [each for each in found if each is not None]

    def _read_progress(self, batch: int) -> Progress | None:
        """What was saved with a checkpoint; None if it cannot be read."""
        try:
            path = self.folder / str(batch) / "metrics" / "metrics"
            progress = json.loads(path.read_bytes())
            return progress if {"step", "batch"} <= progress.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def newest(self) -> Progress | None:
        """The newest one that is not damaged, to resume from; None without any.

        Newer ones are moved aside as in :meth:`first_whole`. What a rewind has undone
        counts again if the checkpoint of the rewind is damaged.
        """
        aside: set[int] = set()
        while True:
            found = [x for x in self._every() if x["batch"] not in aside]
            first = next(iter(select_checkpoints(found, self._keep)), None)
            if first is None or self.first_whole([first]) is not None:
                return first
            aside.add(first["batch"])

    def first_whole(self, candidates: Iterable[Progress]) -> Progress | None:
        """The first that is not damaged, after reading all of its files.

        Those before it are moved to the folder ``<folder>-damaged`` and reported.
        """
        for each in candidates:
            damage = self._find_damage(each["batch"])
            if damage is None:
                return each
            self._set_aside(each["batch"], damage)
        return None

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
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(
                self.folder / str(progress["batch"]) / "state", shapes
            )

    # --- damage ---

    @property
    def aside(self) -> Path:
        """Where damaged checkpoints are moved."""
        return self.folder.with_name(f"{self.folder.name}-damaged")

    @property
    def damaged(self) -> list[str]:
        """The names of the damaged checkpoints that were moved aside."""
        return sorted(path.name for path in self.aside.glob("*"))

    def _find_damage(self, batch: int) -> str | None:
        folder = self.folder / str(batch)
        try:
            if (folder / CHECKSUMS).exists():
                return find_damage(folder)
            self.load({"batch": batch})
        except Exception as error:  # Whatever Orbax makes of a damaged file.
            return _reason(error)
        return None

    def _remove_unreadable(self) -> None:
        """Moves aside what Orbax could not open: it reads all progress at once."""
        batches = self._on_disk()
        for batch in batches:
            missing = not (self.folder / str(batch) / "metrics").exists()
            # It was being deleted, unless it is the newest, which never is.
            deleted = missing and batch < max(batches)
            if self._read_progress(batch) is None and not deleted:
                self._set_aside(batch, "its progress cannot be read")

    def _set_aside(self, batch: int, damage: str) -> None:
        text = f"checkpoint {batch} is damaged: {damage}"
        if self._read_only:
            self._report(f"{text}; it is left out")
            return
        aside = self.aside / str(batch)
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(batch)).rename(aside)
        if self._manager is not None:
            self._manager.reload()
        self._report(f"{text}; it is kept in {aside}")

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self.wait()
        self._thread.shutdown()
        if self._manager is not None:
            self._manager.close()
        self._held.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()
