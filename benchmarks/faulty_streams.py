"""What happens to a run that is broken on purpose, written down before it begins.

Batches, what the gradient is multiplied by and what one of its entries is replaced by
are arrays with an axis of calls: a compiled run is given them, whatever the fault.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from low_precision import corpus, windows
from spike_detection import other_data

WINDOWS = 512  # of held-out text


class Setting(NamedTuple):
    """What is trained.

    Attributes:
      layers: blocks of the model.
      width: of its residual stream.
      batch: rows of 64 bytes per call of the optimizer.
      calls: of the optimizer.
      calls_per_step: more than 1 if it accumulates.
      learning_rate: at the peak, after an eighth of the calls.
    """

    layers: int = 2
    width: int = 64
    batch: int = 8
    calls: int = 240
    calls_per_step: int = 1
    learning_rate: float = 3e-3


class Stream(NamedTuple):
    """What happens to a run, call by call; all but the last have an axis of calls.

    Attributes:
      batch: int32[calls, batch, 65] – windows of bytes.
      factor: float32[calls] – what the gradient is multiplied by.
      entry: float32[calls] – what one entry of it is replaced by, or 0.
      held_out: int32[512, 65] – windows for the loss at the end.
    """

    batch: Any
    factor: Any
    entry: Any
    held_out: Any


# From a stream and random numbers to what the fault makes of it.
Change = Callable[[Stream, np.random.Generator], Stream]


def clean_stream(setting: Setting, seed: int) -> Stream:
    """The data of a run with which nothing is wrong."""
    train, held_out = corpus()
    rng = np.random.default_rng(seed)
    batch = [windows(train, rng, setting.batch) for _ in range(setting.calls)]
    return Stream(
        np.stack(batch),
        np.ones(setting.calls, np.float32),
        np.zeros(setting.calls, np.float32),
        windows(held_out, np.random.default_rng(0), WINDOWS),
    )


def faulty_calls(stream: Stream, clean: Stream) -> np.ndarray:
    """Where a stream differs from the clean one: bool[seeds, calls]."""
    differs = (stream.batch != clean.batch).any((2, 3))
    for name in ("factor", "entry"):
        differs |= getattr(stream, name) != getattr(clean, name)
    return differs


# --- what can go wrong, or only seem to -----------------------------------------------


def at(first: int, length: int = 1) -> slice:
    """Some calls."""
    return slice(first, first + length)


def nothing(stream: Stream, rng: np.random.Generator) -> Stream:
    """The clean run."""
    del rng
    return stream


def multiplied(by: float, where: slice) -> Change:
    """The gradient is longer, shorter, or no number."""

    def change(stream, rng):
        del rng
        factor = stream.factor.copy()
        factor[where] *= by
        return stream._replace(factor=factor)

    return change


def one_entry(value: float, where: slice) -> Change:
    """One entry of the gradient is replaced."""

    def change(stream, rng):
        del rng
        entry = stream.entry.copy()
        entry[where] = value
        return stream._replace(entry=entry)

    return change


def random_bytes(where: slice) -> Change:
    """The batches are noise."""

    def change(stream, rng):
        batch = stream.batch.copy()
        batch[where] = rng.integers(0, 256, batch[where].shape)
        return stream._replace(batch=batch)

    return change


def other_batches(where: slice) -> Change:
    """The batches are others from the same text."""

    def change(stream, rng):
        batch = stream.batch.copy()
        for i in range(*where.indices(len(batch))):
            batch[i] = windows(corpus()[0], rng, batch.shape[1])
        return stream._replace(batch=batch)

    return change


def new_domain(where: slice) -> Change:
    """Batches and held-out text are of another kind, for good."""

    def change(stream, rng):
        train, held_out = map(other_data, corpus())
        batch = stream.batch.copy()
        for i in range(*where.indices(len(batch))):
            batch[i] = windows(train, rng, batch.shape[1])
        fixed = windows(held_out, np.random.default_rng(0), WINDOWS)
        return stream._replace(batch=batch, held_out=fixed)

    return change


def both(first: Change, second: Change) -> Change:
    """One after the other."""

    def change(stream, rng):
        return second(first(stream, rng), rng)

    return change
