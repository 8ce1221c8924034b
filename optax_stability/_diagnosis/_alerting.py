"""Tells a command when the diagnosis finds something in a run that still goes on.

*Problem*: a run that has broken at night trains until morning, because nobody looks.
*Where*: on the host, in the training loop, beside :class:`optax_stability.RunLog`.
*Cost*: a diagnosis of all rows every so many rows; all rows are kept in memory.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._telling import tell


class FindingAlert:
    """Diagnoses the rows of a run while it trains, and runs a command for what is new.

    A webhook, a pager, a kill: the command gets the finding as one line of JSON on its
    input, and its kind and step as the variables ``FINDING_KIND`` and ``FINDING_STEP``.
    ``optax-stability watch LOG --exec COMMAND`` does the same from outside of the run.

    **Guarantees**

    * A loss that is not finite is told with its own row; anything else within ``every``
      rows, or at :meth:`close`.
    * Each kind of finding is told once.
    * A command that fails, or takes more than a minute, does not end the run.

    **Edge cases**: rows without ``loss`` and ``eval/loss``, such as a rewind, and
    arrays and text in a row, are left out.

    Args:
      command: is run in a shell.
      every: rows between two diagnoses.
      report: receives the sentence about a command that failed; by default it becomes a
        warning.

    Raises:
      ValueError: ``every`` is out of range.

    Example:
      >>> alert = FindingAlert("mail -s $FINDING_KIND me@example.org")
      >>> for step in range(30):
      ...     alert.write(step, {"loss": 3.0 - step / 100, "grad/norm": 1.0})
      >>> alert.close()  # Nothing to tell.
    """

    def __init__(
        self,
        command: str,
        *,
        every: int = 50,
        report: Callable[[str], object] = warnings.warn,
    ):
        """Starts without rows."""
        if every < 1:
            raise ValueError(f"every={every} must be at least 1; it counts rows.")
        self._command, self._every, self._report = command, every, report
        self._rows: list[dict[str, float]] = []
        self._told: set[str] = set()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Keeps the row; diagnoses all of them when there are enough new ones."""
        if "loss" not in row and "eval/loss" not in row:
            return
        numbers = {
            key: float(x)
            for key, x in row.items()
            if not isinstance(x, str) and not np.ndim(x)
        }
        self._rows.append(numbers | {"step": step})
        broken = not math.isfinite(numbers.get("loss", 0.0))
        if broken or len(self._rows) % self._every == 0:
            self._diagnose()

    def close(self) -> None:
        """Diagnoses the last rows."""
        if self._rows:
            self._diagnose()

    def _diagnose(self) -> None:
        keys = dict.fromkeys(key for row in self._rows for key in row)
        history = {
            key: np.array([row.get(key, np.nan) for row in self._rows]) for key in keys
        }
        history["step"] = history["step"].astype(int)
        for finding in diagnose(history):
            if finding.kind not in self._told:
                self._told.add(finding.kind)
                failure = tell(self._command, finding._asdict())
                if failure is not None:
                    self._report(f"{failure}; the run goes on")
