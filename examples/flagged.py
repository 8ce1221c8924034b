"""What a guard has left out, kept and looked at again.

A batch whose step was flagged is evaluated once more, with the parameters of now. If
its loss is abnormal again, the fault is in the *data*; if it is normal, the fault was
of the *machine*, and the batch is trained on after all, once.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

Row = dict[str, Any]
MACHINE, DATA = 0.0, 1.0  # recheck/verdict
NEEDED = {"loss", "skip/skipped", "skip/value_limit"}  # of the row of a flagged step


class Drawn(NamedTuple):
    """What a step was trained on.

    Attributes:
      step: the step, from 1.
      batch: number of the draw, from 1.
      position: number of the batch in the data, from 0; some are drawn twice.
      again: whether it was drawn before.
    """

    step: int
    batch: int
    position: int
    again: bool


class Window(NamedTuple):
    """One window of a batch: its loss, its text, and where in which file it is."""

    loss: float
    text: str
    origin: str


class Draws(Protocol):
    """A run that counts what it draws.

    Attributes:
      step: steps taken.
      batch: batches drawn.
      again: positions of the batches to draw once more, before the next new one.
      repeated: number of batches that were drawn once more.
    """

    step: int
    batch: int
    again: list[int]
    repeated: int


def draw(run: Draws) -> Drawn:
    """Counts the next step of a run; what it is trained on."""
    again = bool(run.again)
    position = run.again.pop(0) if again else run.batch - run.repeated
    run.step, run.batch, run.repeated = (
        run.step + 1,
        run.batch + 1,
        run.repeated + again,
    )
    return Drawn(run.step, run.batch, position, again)


class Examines(Protocol):
    """A run that can look at a batch again."""

    step: int

    def examine(self, drawn: Drawn) -> list[Window]:
        """The windows of a batch, with their losses under the current parameters."""
        ...


def is_flagged(row: Row) -> bool:
    """Whether the guard skipped this step, or opened a branch with it."""
    return bool(row.get("skip/skipped") or row.get("branch/length") == 1)


def recheck(run: Examines, drawn: Drawn, row: Row, folder: Path | None) -> Row:
    """Evaluates a flagged batch again, and writes its windows to a file.

    Args:
      run: the run, with its parameters of now.
      drawn: the batch.
      row: what the step measured then.
      folder: where to write the windows; None: nowhere.

    Returns:
      The measurements, for the log, by names that begin with ``recheck/``.
    """
    windows = sorted(run.examine(drawn), key=lambda x: np.nan_to_num(-x.loss, nan=-1e9))
    loss = float(np.mean([x.loss for x in windows]))
    # The limit is 0 or infinite where the guard has none yet.
    limit = row.get("skip/value_limit") or math.inf
    abnormal = not loss <= limit or loss == math.inf
    reason = "abnormal again: the data" if abnormal else "normal: the machine"
    if drawn.again and not abnormal:
        reason = "normal, but it was flagged twice: the data"
    if folder is not None:
        head = (
            f"Step {drawn.step}, batch {drawn.batch}: loss {row['loss']:.4g} when it "
            f"was flagged,\n{loss:.4g} with the parameters of step {run.step}, which "
            f"is {reason}.\n{len(windows)} windows, the highest loss first."
        )
        parts = (f"\n\n──── loss {x.loss:.4g}, {x.origin}\n{x.text}" for x in windows)
        after = "" if drawn.batch == drawn.step else f"_batch_{drawn.batch}"
        path = folder / f"step_{drawn.step}{after}.txt"
        with contextlib.suppress(OSError):  # A full disk: the verdict is in the log.
            folder.mkdir(exist_ok=True)
            path.write_text(head + "".join(parts), encoding="utf-8")
    return {
        "recheck/step": drawn.step,
        "recheck/loss": loss,
        "recheck/worst": windows[0].loss,
        "recheck/verdict": DATA if abnormal or drawn.again else MACHINE,
        "recheck/origin": windows[0].origin,
    }


def align(columns: dict[str, np.ndarray], steps: np.ndarray) -> dict[str, np.ndarray]:
    """The rechecks in a log, at these steps; NaN where there are none."""
    rows = {step: i for i, step in enumerate(columns["step"].tolist())}
    at = [rows.get(step, -1) for step in np.asarray(steps).tolist()]
    return {
        key: np.append(column, math.nan)[at]
        for key, column in columns.items()
        if key.startswith("recheck/")
    }
