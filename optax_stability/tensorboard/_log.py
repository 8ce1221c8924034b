"""The log of a run as TensorBoard reads it.

*Problem*: the usual writers block the run after an error on disk, and show a run that
was resumed as a tangle of curves.

*Where*: on the host, in the training loop, beside :class:`optax_stability.RunLog`.

*Cost*: one event per number; the file is flushed every ten seconds.
"""

import contextlib
import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

from optax_stability._recording._histogram import histogram_edges

# Its classes are made when it is imported, and so unknown to type checkers.
_protocol: Any = importlib.import_module("tensorboardX.proto.event_pb2")
_SECONDS = 10  # between flushes


def _histogram(key: str, counts: np.ndarray) -> Any:
    """The counts of ``record(…, histogram=True)``, over the exponents of two."""
    # Finite limits for the first bin, which starts at 0, and the last, without end.
    exponents = np.log2(histogram_edges()[1:-1])
    limits = np.append(exponents, exponents[-1] + 1)
    middles = limits - 0.5
    return summary.histogram_raw(
        f"{key} (log2)",
        min=limits[counts > 0].min() - 1,
        max=limits[counts > 0].max(),
        num=counts.sum(),
        sum=counts @ middles,
        sum_squares=counts @ middles**2,
        bucket_limits=limits.tolist(),
        bucket_counts=counts.tolist(),
    )


class TensorBoardLog:
    """One curve per number of a row, and histograms.

    **Guarantees**

    * In a folder that was used before, TensorBoard shows only the new run, or the old
      run up to the step from which it was resumed.
    * A killed run loses at most ten seconds.
    * A disk that is full costs points of curves, and nothing else.

    **Edge cases**: non-finite values are left out, because they would spoil the scale
    of the axis, and so is text. After a rewind a curve goes back.

    Args:
      folder: for the file of events; missing folders are created.
      resume_after: the step from which the run is resumed; None for a new run.

    Raises:
      OSError: the file cannot be created.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> log = TensorBoardLog(folder)
      >>> log.write(1, {"loss": 2.5})
      >>> log.close()
      >>> len(list(folder.iterdir()))
      1
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, resume_after: int | None = None
    ):
        """Opens a file of events in the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: after an error on disk its queue blocks the run.
        path = str(Path(folder) / "events")
        self._events = EventsWriter(path, f".{time.time_ns()}")
        self._next_flush = time.monotonic()
        purge = 0 if resume_after is None else resume_after + 1
        self._add(purge, session_log=_protocol.SessionLog(status=1))
        self._events.flush()

    def _add(self, step: int, **content: Any) -> None:
        with contextlib.suppress(OSError):  # A full disk.
            event = _protocol.Event(wall_time=time.time(), step=step, **content)
            self._events.write_event(event)
            if time.monotonic() >= self._next_flush:
                self._events.flush()
                self._next_flush = time.monotonic() + _SECONDS

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a point to each curve.

        Args:
          step: the step.
          row: numbers by name; counts of ``record(…, histogram=True)`` are shown as
            histograms.
        """
        for key, x in row.items():
            if isinstance(x, str) or not np.isfinite(x).all():
                continue
            if not np.ndim(x):
                self._add(step, summary=summary.scalar(key, x))
            elif np.any(x):
                self._add(step, summary=_histogram(key, np.asarray(x)))

    def close(self) -> None:
        """Writes out the events that are still queued."""
        with contextlib.suppress(OSError):
            self._events.close()
