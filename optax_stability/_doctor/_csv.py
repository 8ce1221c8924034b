"""CSV and TSV, with one column per metric, and exports of Weights & Biases.

An export has a column ``<run> - <metric>`` for each run, beside its ``__MIN`` and
``__MAX``: each run is a log of its own.
"""

import csv
import re

import numpy as np

from optax_stability._doctor._log import Rows, UnreadableError, number

_EXPORT = re.compile(r"^(.*) - (.+?)(__MIN|__MAX)?$")


def tables(text: str) -> dict[str, Rows]:
    """Rows by the name of the run; "" if the file holds one.

    Raises:
      UnreadableError: there is no row below the names.
    """
    lines = text.splitlines()
    dialect = "\t" if lines and lines[0].count("\t") > lines[0].count(",") else ","
    if lines and dialect == "," and lines[0].count(";") > lines[0].count(","):
        dialect = ";"
    rows = [row for row in csv.reader(lines, delimiter=dialect) if row]
    if len(rows) < 2:
        raise UnreadableError("there is no row below the names of the columns.")
    head, body = [name.strip() for name in rows[0]], rows[1:]
    if all(number(name) is not None for name in head):
        raise UnreadableError(
            f"the first line, {', '.join(head[:4])}, holds numbers; put the names of "
            "the columns there."
        )
    width = len(head)
    body = [row + [""] * (width - len(row)) for row in body]
    if dialect == ";":  # Where a comma stands for the decimal point.
        body = [[cell.replace(",", ".") for cell in row] for row in body]
    cells = {name: [row[i] for row in body] for i, name in enumerate(head) if name}
    columns, given = {}, {}
    for name, values in cells.items():
        column, there = _numbers(values)
        if there.any():
            columns[name], given[name] = column, there
    return _by_run(columns, given)


def _numbers(cells: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a column, and whether there is one in each cell."""
    there = np.array([cell != "" for cell in cells], bool)
    try:
        return np.array([cell or "nan" for cell in cells]).astype(float), there
    except ValueError:
        values = [number(cell) for cell in cells]
        known = np.array([value is not None for value in values], bool)
        return np.array(values, np.float64), known


def _by_run(
    columns: dict[str, np.ndarray], given: dict[str, np.ndarray]
) -> dict[str, Rows]:
    """The runs of an export; anything else is one run."""
    parts = {name: _EXPORT.match(name) for name in columns}
    runs = dict.fromkeys(part[1] for part in parts.values() if part)
    if not runs:
        return {"": Rows(columns, given, "")}
    shared = [name for name, part in parts.items() if not part]
    found = {}
    for run in runs:
        own = {
            part[2]: name
            for name, part in parts.items()
            if part and part[1] == run and not part[3]
        }
        own |= {name: name for name in shared}
        found[run] = Rows(
            {name: columns[each] for name, each in own.items()},
            {name: given[each] for name, each in own.items()},
            "Weights & Biases",
        )
    return found
