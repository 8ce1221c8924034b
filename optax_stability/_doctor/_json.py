"""JSON: one object per line, or one document with a list of them.

Objects per line are what this library's trainer, MaxText and many others write;
``trainer_state.json`` of Hugging Face holds its rows as ``log_history``.
"""

import json
from typing import Any

from optax_stability._doctor._log import Rows, UnreadableError, rows_of

_HUGGING_FACE = "Hugging Face Trainer"


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as ``outer/inner``; lists and other values are left out."""
    if not any(isinstance(value, dict) for value in record.values()) and not prefix:
        return record
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def document(text: str) -> Rows | None:
    """Rows of a text that is one JSON document; None if it is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    trainer = ""
    if isinstance(content, dict):
        if "log_history" in content:
            content, trainer = content["log_history"], _HUGGING_FACE
        else:
            lists = [each for each in content.values() if isinstance(each, list)]
            if not _records(lists[0] if lists else []):
                return _columns(content)
            content = lists[0]
    if not isinstance(content, list) or not _records(content):
        return None
    return rows_of([flat(each) for each in _records(content)], trainer)


def _records(content: list[Any]) -> list[dict[str, Any]]:
    return [each for each in content if isinstance(each, dict)]


def _columns(content: dict[str, Any]) -> Rows | None:
    """Rows of an object of lists of the same length, one per column."""
    lists = {key: each for key, each in content.items() if isinstance(each, list)}
    lengths = {len(each) for each in lists.values()}
    if len(lengths) != 1:
        return None
    (length,) = lengths
    return rows_of([{key: lists[key][i] for key in lists} for i in range(length)])


def lines(text: str) -> Rows:
    """Rows of one object per line. A last line that was cut off is left out.

    Raises:
      UnreadableError: another line is no JSON object.
    """
    records, numbered = [], text.splitlines()
    for i, line in enumerate(numbered, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if i == len(numbered):
                break
            raise UnreadableError(
                f"line {i} is no JSON: {str(error).split(':')[0]}; remove it, or pass "
                "a log with one object per line."
            ) from error
        if not isinstance(record, dict):
            raise UnreadableError(
                f"line {i} is {type(record).__name__}, not an object; pass a log with "
                "one JSON object per line."
            )
        records.append(flat(record))
    return rows_of(records, _trainer(records))


def _trainer(records: list[dict[str, Any]]) -> str:
    """Who writes such rows."""
    names = set().union(*(each.keys() for each in records[:50])) if records else set()
    if any(name.startswith(("skip/", "clip/", "noise_scale/")) for name in names):
        return "optax_stability"
    if any(name.startswith("learning/") for name in names):
        return "MaxText"
    return ""
