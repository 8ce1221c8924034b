"""What a reader returns: the rows of a log, and what a training log is made of."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class UnreadableError(Exception):
    """An input that is no training log, or not one that can be read; says why."""


class Rows(NamedTuple):
    """A log as it was written.

    Attributes:
      columns: float64[n] by name; NaN where nothing was written.
      given: bool[n] by name – whether something was written, NaN included.
      trainer: what wrote it, "" if that is not known.
    """

    columns: dict[str, np.ndarray]
    given: dict[str, np.ndarray]
    trainer: str


class Log(NamedTuple):
    """A log in the form of a history.

    Attributes:
      name: what to call it: a path, and the name of a run in it.
      trainer: what wrote it, "" if that is not known.
      history: what ``diagnose`` reads.
      columns: name in the history → name in the log, of what was recognised.
    """

    name: str
    trainer: str
    history: dict[str, np.ndarray]
    columns: dict[str, str]


def number(value: Any) -> float | None:
    """A number, also as text, or as ``5/300``, step of steps; None if it is none."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value.partition("/")[0].strip().replace(",", ""))
        except ValueError:
            return None
    return None


def rows_of(records: list[dict[str, Any]], trainer: str = "") -> Rows:
    """Rows from one dict per row; what is no number is left out.

    None is NaN, not nothing: JSON has no NaN, and many write null in its place.
    """
    cells: dict[str, tuple[list[int], list[Any]]] = {}
    for i, record in enumerate(records):
        for name, value in record.items():
            if name not in cells:
                cells[name] = [], []
            rows, values = cells[name]
            rows.append(i)
            values.append(value)
    columns, given = {}, {}
    for name, (rows, values) in cells.items():
        numbers, known = _numbers(values)
        if known.any():
            columns[name] = np.full(len(records), np.nan)
            columns[name][rows] = numbers
            given[name] = np.zeros(len(records), bool)
            given[name][rows] = known
    return Rows(columns, given, trainer)


def _numbers(values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, NaN for what is none; and whether each is one, or None."""
    try:
        return np.array(values, np.float64), np.ones(len(values), bool)
    except (TypeError, ValueError):
        numbers = [number(value) for value in values]
        pairs = zip(values, numbers, strict=True)
        known = [value is None or each is not None for value, each in pairs]
        return np.array(numbers, np.float64), np.array(known, bool)


def read_text(path: Path) -> str:
    """The text of a file; what is no UTF-8 is replaced."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UnreadableError(
            f"{path}: {error.strerror or error}; pass a file or a folder that can be "
            "read."
        ) from error
