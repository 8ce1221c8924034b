"""What a guard has left out, looked at again.

*Problem*: a step that was skipped was harmful, or the machine computed it wrongly: then
a good batch is lost. *Rule*: a batch whose step was flagged is evaluated once more, one
step later. If its loss is abnormal again, the fault is in the data; if it is normal,
the fault was of the machine, unless the batch was flagged before.
"""

import contextlib
import math
from pathlib import Path

import numpy as np

from optax_stability.loop._run import Drawn, Row, Run, Window

MACHINE, DATA = 0.0, 1.0  # recheck/verdict, which diagnose reads
NEEDED = {"loss", "skip/skipped", "skip/value_limit"}  # of the row of a flagged step


def is_flagged(row: Row) -> bool:
    """Whether the guard skipped this step, or opened a branch with it."""
    return bool(row.get("skip/skipped") or row.get("branch/length") == 1)


def _write(path: Path, head: str, windows: list[Window]) -> None:
    parts = (f"\n\n──── loss {x.loss:.4g}, {x.origin}\n{x.text}" for x in windows)
    with contextlib.suppress(OSError):  # A full disk: the verdict is in the log.
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + "".join(parts), encoding="utf-8")


def recheck(run: Run, step: int, drawn: Drawn, row: Row, folder: Path | None) -> Row:
    """Evaluates a flagged batch again, and writes its examples to a file.

    Args:
      run: the run, with its parameters of now.
      step: the step of now.
      drawn: the batch.
      row: what the step measured then.
      folder: where to write the examples; None: nowhere.

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
            f"was flagged,\n{loss:.4g} with the parameters of step {step}, which "
            f"is {reason}.\n{len(windows)} windows, the highest loss first."
        )
        after = "" if drawn.batch == drawn.step else f"_batch_{drawn.batch}"
        _write(folder / f"step_{drawn.step}{after}.txt", head, windows)
    return {
        "recheck/step": drawn.step,
        "recheck/loss": loss,
        "recheck/worst": windows[0].loss,
        "recheck/verdict": DATA if abnormal or drawn.again else MACHINE,
        "recheck/origin": windows[0].origin,
    }
