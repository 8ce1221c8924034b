"""What happens to a run that is broken on purpose, written down before it begins.

Batches, what the gradient is multiplied by and what one of its entries is replaced by
are arrays with an axis of calls: a compiled run is given them, whatever the fault.
"""

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from corpus import corpus, windows
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
      labels: int32[calls, batch, 64] – what is to be told from each byte but the last,
        and those before it.
      factor: float32[calls] – what the gradient is multiplied by.
      entry: float32[calls] – what one entry of it is replaced by, or 0.
      held_out: int32[512, 65] – windows for the loss at the end.
    """

    batch: Any
    labels: Any
    factor: Any
    entry: Any
    held_out: Any


# From a stream and random numbers to what the fault makes of it.
Change = Callable[[Stream, np.random.Generator], Stream]


def clean_stream(setting: Setting, seed: int) -> Stream:
    """The data of a run with which nothing is wrong."""
    train, held_out = corpus()
    rng = np.random.default_rng(seed)
    batch = np.stack([windows(train, rng, setting.batch) for _ in range(setting.calls)])
    return Stream(
        batch,
        batch[..., 1:],
        np.ones(setting.calls, np.float32),
        np.zeros(setting.calls, np.float32),
        windows(held_out, np.random.default_rng(0), WINDOWS),
    )


def faulty_calls(stream: Stream, clean: Stream) -> np.ndarray:
    """Where a stream differs from the clean one: bool[seeds, calls]."""
    names = "batch", "labels", "factor", "entry"
    each = [getattr(stream, name) != getattr(clean, name) for name in names]
    return np.any([x.any(tuple(range(2, x.ndim))) for x in each], axis=0)


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


def with_batches(stream: Stream, where: slice, batch: np.ndarray) -> Stream:
    """Other batches in some calls, labelled as usual."""
    batches, labels = stream.batch.copy(), stream.labels.copy()
    batches[where], labels[where] = batch, batch[..., 1:]
    return stream._replace(batch=batches, labels=labels)


def random_bytes(where: slice, share: float = 1.0) -> Change:
    """So many of the bytes are noise."""

    def change(stream, rng):
        clean = stream.batch[where]
        noise = rng.integers(0, 256, clean.shape)
        hit = share == 1.0 or rng.random(clean.shape) < share
        return with_batches(stream, where, np.where(hit, noise, clean))

    return change


def half_random(where: slice) -> Change:
    """Half of the rows of the batches are noise."""

    def change(stream, rng):
        batch = stream.batch[where].copy()
        half = batch[:, ::2]
        half[...] = rng.integers(0, 256, half.shape)
        return with_batches(stream, where, batch)

    return change


def repeated_byte(where: slice) -> Change:
    """The batches are one letter, another one in every call."""

    def change(stream, rng):
        batch = stream.batch[where]
        letters = rng.integers(33, 127, (len(batch), 1, 1))
        return with_batches(stream, where, np.broadcast_to(letters, batch.shape))

    return change


def shuffled(where: slice) -> Change:
    """The bytes of every window are in any order."""

    def change(stream, rng):
        batch = rng.permuted(stream.batch[where], axis=-1)
        return with_batches(stream, where, batch)

    return change


def shifted_labels(where: slice) -> Change:
    """What is to be told is the byte after the next."""

    def change(stream, rng):
        del rng
        labels = stream.labels.copy()
        labels[where] = np.roll(labels[where], -1, axis=-1)
        return stream._replace(labels=labels)

    return change


def other_batches(where: slice) -> Change:
    """The batches are others from the same text."""

    def change(stream, rng):
        shape = stream.batch[where].shape
        batch = windows(corpus()[0], rng, shape[0] * shape[1]).reshape(shape)
        return with_batches(stream, where, batch)

    return change


# Text to train on, and text held out, as bytes.
Texts = tuple[np.ndarray, np.ndarray]


@functools.cache
def base64() -> Texts:
    """Text of another kind, made from the bytes at hand."""
    train, held_out = map(other_data, corpus())
    return train, held_out


@functools.cache
def prose() -> Texts:
    """Another language: English, from Python's own help."""
    english = "\n".join(topics[name] for name in sorted(topics))
    text = np.frombuffer(english.encode("ascii", "replace"), np.uint8)
    part = len(text) // 10
    return text[part:], text[:part]


@functools.cache
def wide_characters() -> Texts:
    """Another format: UTF-16, in which every other byte is 0."""
    train, held_out = (
        np.stack([text, np.zeros_like(text)], axis=1).ravel() for text in corpus()
    )
    return train, held_out


def backwards() -> Texts:
    """Other statistics of sequences, with the same bytes."""
    train, held_out = (text[::-1] for text in corpus())
    return train, held_out


def half_and_half(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Every second window of the one, the rest of the other."""
    mixed = old.copy()
    mixed[::2] = new[::2]
    return mixed


def new_domain(
    where: slice,
    kind: Callable[[], Texts] = base64,
    *,
    share: float = 1.0,
    over: int = 0,
    block: int = 0,
) -> Change:
    """Batches are of another kind, for good, in turns or here and there.

    Args:
      where: from when on.
      kind: of text; the held-out text is of it too, or half of it where the old kind
        comes again.
      share: of the batches that are.
      over: calls over which ever more rows of a batch are, instead of all at once.
      block: length of the stretches that are, and of those between them that are not.
    """

    def change(stream, rng):
        train, held_out = kind()
        calls = np.arange(*where.indices(len(stream.batch)))
        old = stream.batch[where]
        rows = old.shape[:2]
        new = windows(train, rng, rows[0] * rows[1]).reshape(old.shape)
        since = calls - calls[0]
        hit = np.ones(len(calls), bool)
        if share < 1:
            hit = rng.random(len(calls)) < share
        if block:
            hit = since // block % 2 == 0
        chance = np.where(hit, np.minimum(1, (since + 1) / max(over, 1)), 0)
        chosen = rng.random(rows) < chance[:, None]
        stays = share == 1 and not block
        fixed = windows(held_out, np.random.default_rng(0), WINDOWS)
        fixed = fixed if stays else half_and_half(stream.held_out, fixed)
        batch = np.where(chosen[..., None], new, old)
        return with_batches(stream, where, batch)._replace(held_out=fixed)

    return change


def both(first: Change, second: Change) -> Change:
    """One after the other."""

    def change(stream, rng):
        return second(first(stream, rng), rng)

    return change
