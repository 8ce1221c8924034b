"""Turns files on this computer into batches of tokens; nothing is downloaded.

Text is read as bytes, one token each. A ``.bin`` file holds uint16 token ids without a
header, as nanoGPT writes them.
"""

import dataclasses
import random
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import grain
import numpy as np

_NOT_LIBRARY = {"site-packages", "dist-packages", "idlelib", "lib2to3", "test", "tests"}


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line for them."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A stream of tokens in two parts that share nothing.

    Attributes:
      name: what to call it on the screen.
      train: token ids to learn from.
      held_out: token ids to evaluate on.
      vocabulary: number of ids that covers both.
      unit: ``"byte"`` or ``"token"``.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    unit: str

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of bytes; numbers where no tokenizer is known."""
        if self.unit == "token":
            return " ".join(str(token) for token in tokens) + " "
        return bytes(tokens).decode("utf-8", errors="replace")


def _files(root: Path, pattern: str = "*", without: Iterable[str] = ()) -> list[Path]:
    """Files under a folder that are not hidden, in a random order, always the same.

    The held-out tail of the stream is then a random set of files, not the last folder
    of the alphabet.
    """

    def wanted(path: Path) -> bool:
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        return path.is_file() and not hidden and not set(without) & set(parts)

    files = sorted(path for path in root.rglob(pattern) if wanted(path))
    random.Random(0).shuffle(files)
    return files


def _is_text(content: bytes) -> bool:
    """Whether this is UTF-8 without NUL bytes, whatever the file is called."""
    try:
        return b"\0" not in content and bool(content.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _read_texts(files: Iterable[Path]) -> np.ndarray:
    """The bytes of all files that are text, joined."""
    contents = (path.read_bytes() for path in files)
    return np.frombuffer(b"\n".join(filter(_is_text, contents)), np.uint8)


def _read_ids(path: Path) -> np.ndarray:
    """The token ids of a ``.bin`` file, left on disk until they are used."""
    size = path.stat().st_size
    if not size or size % 2:
        raise InputError(
            f"--data: {path} has {size} bytes, which is no row of uint16 tokens; write "
            "it as nanoGPT's prepare.py does"
        )
    return np.memmap(path, np.uint16, mode="r")


def _split(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first nine tenths, and the last."""
    cut = len(stream) * 9 // 10
    return stream[:cut], stream[cut:]


def _load_ids(path: Path) -> Corpus:
    """A ``.bin`` file; beside a ``train.bin``, ``val.bin`` is the held-out part."""
    val = path.with_name("val.bin")
    if path.name == "train.bin" and val.is_file():
        train, held_out = _read_ids(path), _read_ids(val)
    else:
        train, held_out = _split(_read_ids(path))
    vocabulary = 1 + int(max(train.max(initial=0), held_out.max(initial=0)))
    return Corpus(path.name, train, held_out, vocabulary, "token")


def _load_text(path: Path | None) -> Corpus:
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        name = "Python's standard library"
        stream = _read_texts(_files(library, "*.py", without=_NOT_LIBRARY))
    else:
        name = path.resolve().name
        stream = _read_texts(_files(path) if path.is_dir() else [path])
    if not stream.size:
        raise InputError(f"--data: no UTF-8 text in {path or name}; give a text file")
    return Corpus(name, *_split(stream), vocabulary=256, unit="byte")


def load(path: Path | None, context: int) -> Corpus:
    """Reads a corpus and splits off its last tenth.

    Args:
      path: a text file, a folder (every file under it that is UTF-8 and not hidden), a
        ``.bin`` file, or None for the sources of Python's standard library.
      context: tokens the model sees at once; both parts hold at least one window.

    Raises:
      InputError: the path is missing, unreadable, malformed or too small.
    """
    if path is not None and not path.exists():
        raise InputError(f"--data: no such file or folder: {path}; check the path")
    try:
        is_ids = path is not None and path.suffix == ".bin" and path.is_file()
        corpus = _load_ids(path) if path and is_ids else _load_text(path)
    except OSError as error:
        raise InputError(f"--data: cannot read {path}: {error.strerror}") from error
    least = min(len(corpus.train), len(corpus.held_out))
    if least <= context:
        raise InputError(
            f"--data: {path} is too small: one of its parts has {least} {corpus.unit}s "
            f"and a window takes {context + 1}; give more or a smaller --size"
        )
    return corpus


class _Windows:
    """Random access to windows whose last token is the first of the next.

    A window is read from its first token and predicts the others, so each token is
    predicted once per epoch.
    """

    def __init__(self, stream: np.ndarray, context: int):
        self._stream, self._context = stream, context

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._context

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._context
        return self._stream[start : start + self._context + 1].astype(np.int32)


def batches(
    stream: np.ndarray, context: int, batch_size: int, seed: int
) -> Callable[[int], np.ndarray]:
    """Endless batches by step, int32[batch_size, context + 1], each epoch in new order.

    A batch depends on the arguments alone, so a run resumes by asking for the step it
    stopped at: there is no iterator whose state must be saved.
    """
    windows = grain.MapDataset.source(_Windows(stream, context))
    shuffled = windows.shuffle(seed).repeat().batch(batch_size)
    return lambda step: np.asarray(shuffled[step])
