"""Writers for the numbers of a run: a JSON Lines file, TensorBoard, or several writers.

Every writer has ``write(step, row)`` and ``close()``. It closes at the end of a
``with`` block, so nothing is lost if the run fails. Copy the ones you use.
"""

import abc
import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from tensorboardX import SummaryWriter

import optax_stability as ost

Row = Mapping[str, float]
Histograms = Mapping[str, np.ndarray]


class Writer(abc.ABC):
    """Writes rows of named numbers."""

    @abc.abstractmethod
    def write(self, step: int, row: Row) -> None:
        """Writes the measurements of a step."""

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Writes the counts of ``record(…, histogram=True)``; by default, ignored."""
        del step, counts

    @abc.abstractmethod
    def close(self) -> None:
        """Writes out the rows that are still buffered."""

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()


def _complete_rows(path: Path) -> list[dict]:
    """The rows of a file; a killed process may have left the last line incomplete."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class JsonLines(Writer):
    """One line per row; the file is complete after each line.

    JSON has neither NaN nor infinity: non-finite numbers become null.
    """

    def __init__(self, path: Path, *, resume_after: int | None = None):
        """Creates the file and its folder, or continues the file; else an OSError.

        Args:
          path: path of the file.
          resume_after: rows of a later ``batch`` are dropped, because they will be
            written again; None: all rows are dropped.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = []
        if resume_after is not None and path.exists():
            keep = [row for row in _complete_rows(path) if row["batch"] <= resume_after]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in keep))
        temporary.replace(path)
        self._path = path

    def write(self, step: int, row: Row) -> None:
        """Adds a line."""
        finite = {key: x if math.isfinite(x) else None for key, x in row.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")

    def close(self) -> None:
        """Does nothing."""


def _join_by_step(rows: Iterable[dict]) -> dict[int, dict]:
    """The rows by step, without those that a rewind has undone."""
    joined: dict[int, dict] = {}
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


def read_json_lines(path: Path) -> dict[str, np.ndarray]:
    """Reads the columns of such a file as a history; rows of one step are joined.

    A rewind is recognised by ``batch``, which never decreases. If a rewind returned to
    an earlier step, the older rows from that step on are left out, so the columns are
    in order of step. Null and missing values are NaN. An incomplete last line is left
    out.
    """
    rows = _join_by_step(_complete_rows(path))
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    columns = {
        key: np.array([row.get(key) for row in rows.values()], float) for key in keys
    }
    return columns | {"step": np.array(list(rows), int)}


class TensorBoard(Writer):
    """One curve per key, and histograms.

    Non-finite values are left out, because they would spoil the scale of the axis.

    In a folder that was used before, TensorBoard shows only the new run, or the old run
    up to the step from which it was resumed. After a rewind a curve goes back. A killed
    run loses at most ten seconds.
    """

    def __init__(self, folder: Path, *, resume_after_step: int | None = None):
        """Opens an event file in the folder; raises OSError if it cannot."""
        purge = 0 if resume_after_step is None else resume_after_step + 1
        # A long queue: a full queue would block the run.
        self._events = SummaryWriter(
            str(folder), purge_step=purge, max_queue=1000, flush_secs=10
        )

    def write(self, step: int, row: Row) -> None:
        """Adds a point to each curve."""
        for key, x in row.items():
            if math.isfinite(x):
                self._events.add_scalar(key, x, step)

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Adds one histogram per key, over the exponents of two."""
        for key, each in counts.items():
            if np.isfinite(each).all() and each.any():
                self._write_histogram(step, key, each)

    def _write_histogram(self, step: int, key: str, counts: np.ndarray) -> None:
        # Finite limits for the first bin, which starts at 0, and the last, without end.
        exponents = np.log2(ost.histogram_edges()[1:-1])
        limits = np.append(exponents, exponents[-1] + 1)
        middles = limits - 0.5
        self._events.add_histogram_raw(
            f"{key} (log2)",
            min=limits[counts > 0].min() - 1,
            max=limits[counts > 0].max(),
            num=counts.sum(),
            sum=counts @ middles,
            sum_squares=counts @ middles**2,
            bucket_limits=limits.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        """Writes out the events that are still queued."""
        self._events.close()


class Several(Writer):
    """Writes every row to several writers, and closes all of them."""

    def __init__(self, *writers: Writer):
        """Takes open writers."""
        self._writers = writers

    def write(self, step: int, row: Row) -> None:
        """Passes the row to all writers."""
        for writer in self._writers:
            writer.write(step, row)

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Passes the histograms to all writers."""
        for writer in self._writers:
            writer.write_histograms(step, counts)

    def close(self) -> None:
        """Closes all writers, also if closing one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
