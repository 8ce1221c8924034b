"""Tells a command when the diagnosis finds something in a run that still goes on.

A webhook, a pager, a kill: the command gets the finding as one line of JSON on its
input, and its kind and step as FINDING_KIND and FINDING_STEP.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
from writers import Row, Writer

import optax_stability as ost

EVERY = 50  # rows between diagnoses
SECONDS = 60  # after which a command is ended


class OnFinding(Writer):
    """Diagnoses the rows of a run now and then, and runs a command for what is new."""

    def __init__(self, command: str):
        """Runs ``command`` in a shell, once for each kind of finding."""
        self._command = command
        self._rows: list[tuple[int, Row]] = []
        self._told: set[str] = set()

    def write(self, step: int, row: Row) -> None:
        """Keeps the row; diagnoses all of them when there are enough new ones."""
        if "loss" not in row and "eval/loss" not in row:
            return  # A rewind, say: no step of training.
        self._rows.append((step, dict(row)))
        broken = not math.isfinite(row.get("loss", 0.0))
        if broken or len(self._rows) % EVERY == 0:
            self.diagnose()

    def close(self) -> None:
        """Diagnoses the last rows."""
        self.diagnose()

    def diagnose(self) -> None:
        """Runs the command for each finding of a kind that was not there before."""
        keys = dict.fromkeys(key for _, row in self._rows for key in row)
        history = {
            key: np.array([row.get(key, np.nan) for _, row in self._rows])
            for key in keys
        }
        history["step"] = np.array([step for step, _ in self._rows])
        for finding in ost.diagnose(history) if self._rows else ():
            if finding.kind not in self._told:
                self._told.add(finding.kind)
                self._tell(finding)

    def _tell(self, finding: ost.Finding) -> None:
        named = {"FINDING_KIND": finding.kind, "FINDING_STEP": str(finding.step)}
        message = json.dumps(finding._asdict(), ensure_ascii=False) + "\n"
        try:
            subprocess.run(
                self._command,
                shell=True,
                input=message,
                text=True,
                env=os.environ | named,
                timeout=SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            sys.stderr.write(f"--on-finding: {error}; the run goes on\n")


def on_finding(command: str | None) -> list[Writer]:
    """The writer for a command, if there is one."""
    return [OnFinding(command)] if command else []
