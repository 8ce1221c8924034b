"""Turns files on this computer into batches of tokens; nothing is downloaded.

Text is read as bytes, one token each, or cut into tokens by a vocabulary that is on
disk: a ``tokenizer.json`` of Hugging Face's tokenizers, or a ``*.tiktoken`` file of
ranks. A ``.bin`` file holds uint16 token ids without a header, as nanoGPT writes them.
"""

import base64
import dataclasses
import importlib.util
import random
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import numpy as np
from input_error import InputError

_NOT_LIBRARY = {"site-packages", "dist-packages", "idlelib", "lib2to3", "test", "tests"}

# What tiktoken cuts text into before it joins bytes: that of GPT-4, cl100k_base.
_WORDS = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back.

    Attributes:
      encode: text → token ids.
      decode: token ids → text.
      vocabulary: number of ids.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocabulary: int


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a vocabulary from disk.

    Raises:
      InputError: it is missing, malformed or of another kind, or its package is not
        installed.
    """
    packages = {".json": "tokenizers", ".tiktoken": "tiktoken"}
    if not path.is_file():
        raise InputError(f"--tokenizer: no such file: {path}; check the path")
    if path.suffix not in packages:
        known = "a tokenizer.json or a *.tiktoken file of ranks"
        raise InputError(f"--tokenizer: cannot read {path}; give {known}")
    package = packages[path.suffix]
    if importlib.util.find_spec(package) is None:
        needs = f"needs the package {package}; pip install {package}"
        raise InputError(f"--tokenizer: {path} {needs}")
    read = _read_json if package == "tokenizers" else _read_ranks
    try:
        return read(path)
    except Exception as error:  # Rust's errors have no class of their own.
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--tokenizer: {path} is no {package} file: {reason}"
        ) from error


def _read_json(path: Path) -> Tokenizer:
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(path))
    # What was made for short inputs may say to cut them off, or to fill them up.
    found.no_truncation()
    found.no_padding()
    return Tokenizer(
        lambda text: found.encode(text, add_special_tokens=False).ids,
        found.decode,
        found.get_vocab_size(),
    )


def _read_ranks(path: Path) -> Tokenizer:
    import tiktoken

    # Not by tiktoken's own reader: it keeps a copy of the file by its path, and would
    # return that when the file has changed.
    lines = map(bytes.split, path.read_bytes().splitlines())
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError("a line is not a token in base64 and its rank") from error
    if not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("not every byte has a rank")
    known = set(ranks.values())
    if len(known) < len(ranks):
        raise ValueError("two tokens have the same rank")
    found = tiktoken.Encoding(
        path.stem, pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    return Tokenizer(
        found.encode_ordinary,
        lambda ids: found.decode([each for each in ids if each in known]),
        found.n_vocab,
    )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A stream of tokens in two parts that share nothing.

    Attributes:
      name: what to call it on the screen.
      train: token ids to learn from.
      held_out: token ids to evaluate on.
      vocabulary: number of ids that covers both.
      unit: ``"byte"`` or ``"token"``.
      bytes_per_token: of the held-out part; None where no tokenizer is known.
      tokenizer: what made the tokens; None for bytes and for ids.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    unit: str
    bytes_per_token: float | None
    tokenizer: Tokenizer | None = None

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text; numbers where no tokenizer is known.

        A model may know more ids than the data has: those stand for no text.
        """
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        if self.unit == "token":
            return " ".join(str(token) for token in tokens) + " "
        known = bytes(token for token in tokens if token < 256)
        return known.decode("utf-8", errors="replace")


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


def _read_texts(files: Iterable[Path]) -> list[bytes]:
    """What is in all files that are text."""
    return list(filter(_is_text, (path.read_bytes() for path in files)))


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


def _split_texts(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The first nine tenths of all bytes, and the last; one text is cut in two."""
    left = sum(map(len, texts)) * 9 // 10
    first, last = [], []
    for text in texts:
        first.append(text[:left])
        last.append(text[left:])
        left = max(0, left - len(text))
    return first, last


def _encode(tokenizer: Tokenizer, texts: Iterable[bytes]) -> np.ndarray:
    """Text by text, which takes less time and memory than all at once."""
    ids = (tokenizer.encode(text.decode(errors="ignore")) for text in texts)
    return np.concatenate([np.array(each, np.int32) for each in ids])


def _load_ids(path: Path, tokenizer: Tokenizer | None) -> Corpus:
    """A ``.bin`` file; beside a ``train.bin``, ``val.bin`` is the held-out part."""
    val = path.with_name("val.bin")
    if path.name == "train.bin" and val.is_file():
        train, held_out = _read_ids(path), _read_ids(val)
    else:
        train, held_out = _split(_read_ids(path))
    vocabulary = 1 + int(max(train.max(initial=0), held_out.max(initial=0)))
    size = None
    if tokenizer is not None:
        if vocabulary > tokenizer.vocabulary:
            says = f"{path} has ids up to {vocabulary - 1}, and the vocabulary"
            remedy = f"ends at {tokenizer.vocabulary - 1}; give the one it was made by"
            raise InputError(f"--tokenizer: {says} {remedy}")
        vocabulary, part = tokenizer.vocabulary, held_out[:100_000].tolist()
        size = len(tokenizer.decode(part).encode()) / max(1, len(part))
    return Corpus(path.name, train, held_out, vocabulary, "token", size, tokenizer)


def _load_text(path: Path | None, tokenizer: Tokenizer | None) -> Corpus:
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        name = "Python's standard library"
        texts = _read_texts(_files(library, "*.py", without=_NOT_LIBRARY))
    else:
        name = path.resolve().name
        texts = _read_texts(_files(path) if path.is_dir() else [path])
    if not texts:
        raise InputError(f"--data: no UTF-8 text in {path or name}; give a text file")
    parts = _split_texts([*(text + b"\n" for text in texts[:-1]), texts[-1]])
    if tokenizer is None:
        train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
        return Corpus(name, train, held_out, 256, "byte", bytes_per_token=1.0)
    train, held_out = (_encode(tokenizer, part) for part in parts)
    size = sum(map(len, parts[1])) / max(1, len(held_out))
    return Corpus(name, train, held_out, tokenizer.vocabulary, "token", size, tokenizer)


def load(path: Path | None, context: int, vocabulary: Path | None = None) -> Corpus:
    """Reads a corpus and splits off its last tenth.

    Args:
      path: a text file, a folder (every file under it that is UTF-8 and not hidden), a
        ``.bin`` file, or None for the sources of Python's standard library.
      context: tokens the model sees at once; both parts hold at least one window.
      vocabulary: file of a tokenizer; None reads text as bytes.

    Raises:
      InputError: the path is missing, unreadable, malformed or too small.
    """
    if path is not None and not path.exists():
        raise InputError(f"--data: no such file or folder: {path}; check the path")
    tokenizer = None if vocabulary is None else load_tokenizer(vocabulary)
    try:
        if path is not None and path.suffix == ".bin" and path.is_file():
            corpus = _load_ids(path, tokenizer)
        else:
            corpus = _load_text(path, tokenizer)
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
