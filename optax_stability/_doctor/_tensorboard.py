"""TensorBoard event files, by the protocol buffers of ``tensorboard`` itself.

A file is a sequence of records: length (8 bytes), its checksum (4), an event, its
checksum (4). A file that is still being written may end in part of one.
"""

import importlib
import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np

from optax_stability._doctor._log import Rows, UnreadableError

_MODULES = "tensorboard.compat.proto.event_pb2", "tensorboardX.proto.event_pb2"


def is_event_file(path: Path) -> bool:
    """Whether it is called like one."""
    return "tfevents" in path.name


def _event_class() -> Any:
    for name in _MODULES:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            return importlib.import_module(name).Event
    raise UnreadableError(
        "event files need TensorBoard, which is not installed; pip install "
        '"optax_stability[tensorboard]".'
    )


def _records(content: bytes):
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def _value(value: Any) -> float | None:
    """The number of a summary, whichever field it is in."""
    if value.HasField("simple_value"):
        return value.simple_value
    if not value.HasField("tensor") or value.tensor.tensor_shape.dim:
        return None
    tensor = value.tensor
    for numbers in (tensor.float_val, tensor.double_val, tensor.int64_val):
        if len(numbers) == 1:
            return float(numbers[0])
    kinds = {4: np.float32, 8: np.float64}
    kind = kinds.get(len(tensor.tensor_content))
    return float(np.frombuffer(tensor.tensor_content, kind)[0]) if kind else None


def rows(paths: list[Path]) -> Rows:
    """Rows of all event files of a run, one per step.

    Raises:
      UnreadableError: a file cannot be read, or TensorBoard is missing.
    """
    event_class = _event_class()
    from google.protobuf.message import DecodeError

    found: dict[str, dict[int, float]] = {}
    for path in sorted(paths):
        try:
            for record in _records(path.read_bytes()):
                event = event_class.FromString(record)
                for each in event.summary.value:
                    number = _value(each)
                    if number is not None:
                        found.setdefault(each.tag, {})[event.step] = number
        except OSError as error:
            raise UnreadableError(f"{path}: {error.strerror}.") from error
        except DecodeError as error:
            raise UnreadableError(f"{path}: damaged event file.") from error
    steps = np.unique([step for points in found.values() for step in points])
    columns, given = {"step": steps.astype(float)}, {"step": np.ones(len(steps), bool)}
    for tag, points in found.items():
        at = np.searchsorted(steps, list(points))
        columns[tag], given[tag] = (
            np.full(len(steps), np.nan),
            np.zeros(len(steps), bool),
        )
        columns[tag][at], given[tag][at] = list(points.values()), True
    return Rows(columns, given, "TensorBoard")
