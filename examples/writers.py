"""Writers for the numbers of a run: a JSON Lines file, TensorBoard, or several writers.

Every writer has ``write(step, row)`` and ``close()``. It closes at the end of a
``with`` block, so nothing is lost if the run fails. Copy the ones you use.
"""

import abc
import contextlib
import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

import optax_stability as ost

# Its classes are made when it is imported, and so unknown to type checkers.
_protocol: Any = importlib.import_module("tensorboardX.proto.event_pb2")

Row = Mapping[str, Any]  # Numbers, and a few texts.
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


class JsonLines(ost.RunLog, Writer):
    """One line of JSON per row, which ``ost.read_log`` reads."""


class TensorBoard(Writer):
    """One curve per key, and histograms.

    Non-finite values are left out, because they would spoil the scale of the axis.

    In a folder that was used before, TensorBoard shows only the new run, or the old run
    up to the step from which it was resumed. After a rewind a curve goes back. A killed
    run loses at most ten seconds.
    """

    def __init__(self, folder: Path, *, resume_after_step: int | None = None):
        """Opens an event file in the folder; raises OSError if it cannot."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: after an error on disk its queue blocks the run.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._next_flush = time.monotonic()
        purge = 0 if resume_after_step is None else resume_after_step + 1
        self._add(purge, session_log=_protocol.SessionLog(status=1))
        self._events.flush()

    def _add(self, step: int, **content: Any) -> None:
        # A disk that is full costs points of a curve, and nothing else.
        with contextlib.suppress(OSError):
            event = _protocol.Event(wall_time=time.time(), step=step, **content)
            self._events.write_event(event)
            if time.monotonic() >= self._next_flush:
                self._events.flush()
                self._next_flush = time.monotonic() + 10

    def write(self, step: int, row: Row) -> None:
        """Adds a point to each curve."""
        for key, x in row.items():
            if not isinstance(x, str) and math.isfinite(x):
                self._add(step, summary=summary.scalar(key, x))

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
        content = summary.histogram_raw(
            f"{key} (log2)",
            min=limits[counts > 0].min() - 1,
            max=limits[counts > 0].max(),
            num=counts.sum(),
            sum=counts @ middles,
            sum_squares=counts @ middles**2,
            bucket_limits=limits.tolist(),
            bucket_counts=counts.tolist(),
        )
        self._add(step, summary=content)

    def close(self) -> None:
        """Writes out the events that are still queued."""
        with contextlib.suppress(OSError):
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
