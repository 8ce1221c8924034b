"""The log of a run on disk: one line of JSON per row, whatever happens to the run.

*Problem*: a log is written by processes that are killed, resumed and rewound, on disks
that fill up and lose power. To a reader that expects every line to be whole, one bad
line is the loss of the run.

*Where*: on the host, in the training loop. *Cost*: opening a file per row.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optax_stability._core import _atomic_file

Row = dict[str, Any]


def _parse(line: bytes) -> Row | None:
    """A row with a step; None if the line is anything else."""
    try:
        row = json.loads(line)
    except ValueError:  # No JSON, or no UTF-8.
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole else None


def _rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, and how many of its lines are none.

    The last line may be incomplete, because a process was killed: it does not count.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    parsed = list(map(_parse, lines))
    rows = [row for row in parsed if row is not None]
    return rows, len(parsed) - len(rows)


def _left_out(path: Path, count: int) -> str:
    lines = "1 line that is" if count == 1 else f"{count} lines that are"
    return f"{path}: left out {lines} no row in JSON"


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """A file with one line of JSON per row; it is complete after each line.

    **Guarantees**

    * A process that is killed loses at most the row that it was writing.
    * Nothing in an older file stops the run: lines that are no JSON, half lines, blank
      lines, NULs are left out and counted, and the old file is kept as ``….damaged``.
    * Rows that cannot be written, because the disk is full, stay in memory until they
      can; the file never keeps a part of them.

    **Edge cases**: non-finite numbers become null; arrays with axes are left out. A
    folder that was removed is created again.

    Args:
      path: path of the file; missing folders are created.
      resume_after: rows of a later ``batch`` are dropped, because they will be written
        again; None: all rows are dropped.
      report: receives each sentence about lines that are damaged or cannot be written;
        by default it becomes a warning.

    Raises:
      OSError: the file cannot be created.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> log = RunLog(path)
      >>> log.write(1, {"batch": 1, "loss": 2.5})
      >>> log.write(2, {"batch": 2, "loss": float("nan")})
      >>> RunLog(path, resume_after=1).write(2, {"batch": 2, "loss": 2.25})
      >>> read_log(path)["loss"]
      array([2.5 , 2.25])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_after: int | None = None,
        report: Callable[[str], object] = warnings.warn,
    ):
        """Creates the file, or continues it."""
        self._path, self._report = Path(path), report
        keep: list[Row] = []
        if resume_after is not None and self._path.exists():
            rows, damaged = _rows(self._path)
            keep = [row for row in rows if row.get("batch", 0) <= resume_after]
            if damaged:
                aside = self._path.with_name(f"{self._path.name}.damaged")
                shutil.copyfile(self._path, aside)
                report(f"{_left_out(self._path, damaged)}; {aside} has them")
        # What a process that was killed here has left.
        for old in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            old.unlink(missing_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in keep).encode()
        _atomic_file.write(self._path, content)
        self._size, self._waiting, self._failing = len(content), b"", False

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a line."""
        numbers = {key: x for key, x in row.items() if not getattr(x, "ndim", 0)}
        plain = {"step": step} | {key: _plain(x) for key, x in numbers.items()}
        self._waiting += json.dumps(plain).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._failing:
                self._report(
                    f"{self._path}: cannot be written ({error.strerror}); its rows "
                    "wait in memory until it can"
                )
            self._failing = True

    def _flush(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            # What a failed attempt may have left.
            self._size = min(self._size, file.tell())
            file.truncate(self._size)
            file.write(self._waiting)
        self._size += len(self._waiting)
        self._waiting, self._failing = b"", False

    def close(self) -> None:
        """Writes what still waits, or reports how many rows are lost."""
        try:
            if self._waiting:
                self._flush()
        except OSError as error:
            lost = self._waiting.count(b"\n")
            self._report(f"{self._path}: {lost} rows are lost ({error.strerror})")


def _join_by_step(rows: Iterable[Row]) -> dict[int, Row]:
    """The rows by step, without those that a rewind has undone."""
    joined: dict[int, Row] = {}
    newest = -1, -1
    for row in rows:
        step, batch = row["step"], row.get("batch")
        if batch is not None:
            # A rewind: an earlier step with a later batch, or the same step with a new
            # batch.
            if step <= newest[0] and (batch, -step) > (newest[1], -newest[0]):
                joined = {at: x for at, x in joined.items() if at < step}
            newest = step, batch
        joined.setdefault(step, {}).update(row)
    return joined


def read_log(
    path: str | os.PathLike[str], *, report: Callable[[str], object] = warnings.warn
) -> dict[str, np.ndarray]:
    """Reads the columns of a :class:`RunLog` as a history; rows of a step are joined.

    **Guarantees**: lines that are no row in JSON are left out and counted; an
    incomplete last line, which a killed process leaves, is left out silently.

    **Edge cases**: a rewind is recognised by ``batch``, which never decreases: the rows
    that it has undone are left out, so the columns are in order of step. Null and
    missing values are NaN. Columns that hold anything but numbers are left out.

    Args:
      path: path of the file.
      report: receives the sentence about damaged lines; by default it becomes a
        warning.

    Returns:
      A history for :func:`diagnose` and :func:`plot_history`.

    Raises:
      OSError: the file cannot be read.
    """
    rows, damaged = _rows(Path(path))
    if damaged:
        report(_left_out(Path(path), damaged))
    joined = _join_by_step(rows)
    columns = {}
    for key in dict.fromkeys(key for row in joined.values() for key in row):
        values = [row.get(key) for row in joined.values()]
        if all(x is None or isinstance(x, int | float) for x in values):
            columns[key] = np.array(values, float)
    return columns | {"step": np.array(list(joined), int)}
