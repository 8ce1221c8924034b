"""Reads a path: a file of any known format, or the log in a folder."""

import json
from pathlib import Path

from optax_stability._doctor import _csv, _json, _tensorboard, _text
from optax_stability._doctor._columns import log_of
from optax_stability._doctor._log import Log, Rows, UnreadableError, read_text

# Files of a folder, the best first: of one kind all are read.
_KINDS = (
    ("log.jsonl",),
    ("trainer_state.json",),
    ("*.jsonl",),
    ("metrics*.json", "log_history*.json"),
    ("*tfevents*",),
    ("*.csv", "*.tsv"),
    ("*.log", "*.txt", "*.out"),
    ("*.json",),
)


def read(path: str, chosen: dict[str, str]) -> list[Log]:
    """The logs at a path, at least one.

    Args:
      path: a file or a folder.
      chosen: the columns that the user named, by their name in a history.

    Raises:
      UnreadableError: there is none, or it cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        return _in_folder(place, chosen)
    if not place.exists():
        raise UnreadableError(f"{path}: there is no such file or folder.")
    return _logs(str(place), _in_file(place), chosen)


def _logs(name: str, runs: dict[str, Rows], chosen: dict[str, str]) -> list[Log]:
    """The logs of all runs of a file; of several, those that are trainings."""
    found, errors = [], []
    for run, rows in runs.items():
        try:
            found.append(log_of(f"{name} · {run}" if run else name, rows, chosen))
        except UnreadableError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _in_file(path: Path) -> dict[str, Rows]:
    """The rows of a file, by run."""
    if _tensorboard.is_event_file(path):
        return {"": _tensorboard.rows([path])}
    text = read_text(path).lstrip("\ufeff")
    if not text.strip():
        raise UnreadableError(f"{path}: the file is empty.")
    try:
        return _in_text(path, text)
    except UnreadableError as error:
        raise UnreadableError(f"{path}: {error}") from error


def _in_text(path: Path, text: str) -> dict[str, Rows]:
    first = text.lstrip()[:1]
    if first in "{[":
        if path.suffix != ".jsonl" and (rows := _json.document(text)):
            return {"": rows}
        if first == "{" and _is_object(text.lstrip().partition("\n")[0]):
            return {"": _json.lines(text)}
        if rows := _json.document(text):
            return {"": rows}
    if path.suffix in (".csv", ".tsv"):
        return _csv.tables(text)
    if rows := _text.rows(text):
        return {"": rows}
    head = text.partition("\n")[0]
    if "," in head or "\t" in head:
        return _csv.tables(text)
    raise UnreadableError(
        "no loss and no gradient norm was found; pass JSON lines, trainer_state.json, "
        "CSV, event files of TensorBoard, or a text log with lines such as 'step: 10 "
        "loss: 2.31'."
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _in_folder(folder: Path, chosen: dict[str, str]) -> list[Log]:
    """The logs in a folder and below, of the first kind that there is."""
    errors = []
    for patterns in _KINDS:
        paths = sorted({path for each in patterns for path in folder.rglob(each)})
        paths = [path for path in paths if path.is_file()]
        if patterns == ("trainer_state.json",):
            # Each checkpoint repeats the rows of those before.
            paths = sorted(paths, key=lambda path: path.stat().st_size)[-1:]
        found = []
        for name, runs in _sources(paths, errors):
            try:
                found += _logs(name, runs, chosen)
            except UnreadableError as error:
                errors.append(error)
        if found:
            return found
    raise (
        errors[0]
        if errors
        else UnreadableError(
            f"{folder}: there is no log in this folder; pass one with JSON lines, "
            "trainer_state.json, CSV, event files of TensorBoard or text logs."
        )
    )


def _sources(paths: list[Path], errors: list[UnreadableError]):
    """(name, runs) of files; event files of one folder are one run."""
    events: dict[Path, list[Path]] = {}
    for path in paths:
        if _tensorboard.is_event_file(path):
            events.setdefault(path.parent, []).append(path)
            continue
        try:
            yield str(path), _in_file(path)
        except UnreadableError as error:
            errors.append(error)
    for folder, files in events.items():
        try:
            yield str(folder), {"": _tensorboard.rows(files)}
        except UnreadableError as error:
            errors.append(error)
