"""Where the numbers of a run go: a file of JSON lines, TensorBoard, several places.

Every writer has ``write(step, row)`` and ``close()``, and closes at the end of a
``with`` block, so that an error in the run loses nothing. Copy the ones you use.
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
    """Takes one row of named numbers after the other."""

    @abc.abstractmethod
    def write(self, step: int, row: Row) -> None:
        """Keeps what was measured at a step."""

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Keeps what ``record(…, histogram=True)`` counted; leaves it out here."""
        del step, counts

    @abc.abstractmethod
    def close(self) -> None:
        """Writes out what is still held back."""

    def __enter__(self) -> Self:
        """Is its own context."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, also after an error."""
        self.close()


def _whole_rows(path: Path) -> list[dict]:
    """The rows of a file whose last line may be torn, as a killed process leaves it."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class JsonLines(Writer):
    """One line per row, in a file that is whole after each of them.

    JSON has neither NaN nor infinity: what is not finite becomes null.
    """

    def __init__(self, path: Path, *, resume_after: int | None = None):
        """Makes the file and its folder, or goes on with it; an OSError if it cannot.

        Args:
          path: of the file.
          resume_after: rows of a later ``batch`` are dropped, for they will be written
            again; None: all are.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = []
        if resume_after is not None and path.exists():
            keep = [row for row in _whole_rows(path) if row["batch"] <= resume_after]
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in keep))
        beside.replace(path)
        self._path = path

    def write(self, step: int, row: Row) -> None:
        """Adds a line."""
        finite = {key: x if math.isfinite(x) else None for key, x in row.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")

    def close(self) -> None:
        """Has nothing to do."""


def _joined(rows: Iterable[dict]) -> dict[int, dict]:
    """The rows by step, without those that a rewind has undone."""
    joined: dict[int, dict] = {}
    newest = -1, -1
    for row in rows:
        step, batch = row["step"], row.get("batch")
        if batch is not None:
            # An earlier step after a later batch, or the same one after a new batch.
            if step <= newest[0] and (batch, -step) > (newest[1], -newest[0]):
                joined = {at: x for at, x in joined.items() if at < step}
            newest = step, batch
        joined.setdefault(step, {}).update(row)
    return joined


def read_json_lines(path: Path) -> dict[str, np.ndarray]:
    """The columns of such a file, rows of one step joined, as a history.

    Where a rewind took the run back to an earlier step, by the ``batch`` of its rows,
    which never falls, all rows before from that step on are left out: the columns are
    those of the run that counts, in order of step. Null, and what a row does not have,
    is NaN. A last line that is torn is left out.
    """
    rows = _joined(_whole_rows(path))
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    columns = {
        key: np.array([row.get(key) for row in rows.values()], float) for key in keys
    }
    return columns | {"step": np.array(list(rows), int)}


class TensorBoard(Writer):
    """One curve per key, and histograms.

    What is not finite is left out, for it would break the axis.

    In a folder that was used before, TensorBoard shows the new run alone, or the old
    one up to where it is gone on with. After a rewind a curve goes back. A run that is
    killed loses ten seconds at most.
    """

    def __init__(self, folder: Path, *, resume_after_step: int | None = None):
        """Opens a file of events in the folder; an OSError if it cannot."""
        purge = 0 if resume_after_step is None else resume_after_step + 1
        # A full queue would make the run wait.
        self._events = SummaryWriter(
            str(folder), purge_step=purge, max_queue=1000, flush_secs=10
        )

    def write(self, step: int, row: Row) -> None:
        """Adds a point to each curve."""
        for key, x in row.items():
            if math.isfinite(x):
                self._events.add_scalar(key, x, step)

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Adds a histogram each, over the exponents of two."""
        for key, each in counts.items():
            if np.isfinite(each).all() and each.any():
                self._write_histogram(step, key, each)

    def _write_histogram(self, step: int, key: str, counts: np.ndarray) -> None:
        # The first bin has no lower end but 0, the last no upper one.
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
    """Writes every row to each of its writers, and closes them together."""

    def __init__(self, *writers: Writer):
        """Takes writers that are open."""
        self._writers = writers

    def write(self, step: int, row: Row) -> None:
        """Hands the row to all."""
        for writer in self._writers:
            writer.write(step, row)

    def write_histograms(self, step: int, counts: Histograms) -> None:
        """Hands the histograms to all."""
        for writer in self._writers:
            writer.write_histograms(step, counts)

    def close(self) -> None:
        """Closes all, also where one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
