"""Turns files on this computer into batches of tokens; nothing is downloaded.

Text is read as bytes, one token each, or split into tokens by a tokenizer file on disk:
a ``tokenizer.json`` of Hugging Face's tokenizers, or a ``*.tiktoken`` file of ranks. A
``.bin`` file holds uint16 token ids without a header, as nanoGPT writes them.
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

# The pieces into which tiktoken splits text before it merges bytes: GPT-4's
# cl100k_base.
_WORDS = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Converts text to tokens and back.

    Attributes:
      encode: text → token ids.
      decode: token ids → text.
      vocabulary: number of ids.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocabulary: int


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer from disk.

    Raises:
      InputError: the file is missing, malformed or of an unknown kind, or the package
        that reads it is not installed.
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
    except Exception as error:  # The Rust packages raise plain Exception.
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--tokenizer: {path} is not a {package} file: {reason}"
        ) from error


def _read_json(path: Path) -> Tokenizer:
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(path))
    # The file may ask for truncation or padding to a fixed length.
    found.no_truncation()
    found.no_padding()
    return Tokenizer(
        lambda text: found.encode(text, add_special_tokens=False).ids,
        found.decode,
        found.get_vocab_size(),
    )


def _read_ranks(path: Path) -> Tokenizer:
    import tiktoken

    # tiktoken's own reader is not used: it caches the file by its path, and returns the
    # old content after the file has changed.
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
    """A stream of tokens in two disjoint parts.

    Attributes:
      name: its name on the screen.
      train: token ids to train on.
      held_out: token ids to evaluate on.
      vocabulary: number of ids that covers both.
      unit: ``"byte"`` or ``"token"``.
      bytes_per_token: mean of the held-out part; None if no tokenizer is known.
      tokenizer: the tokenizer of the ids; None for bytes, or if it is not known.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    unit: str
    bytes_per_token: float | None
    tokenizer: Tokenizer | None = None

    def decode(self, tokens: Sequence[int]) -> str:
        """Converts tokens to text, or to numbers if no tokenizer is known.

        A model may have more ids than the data: those ids are left out.
        """
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        if self.unit == "token":
            return " ".join(str(token) for token in tokens) + " "
        known = bytes(token for token in tokens if token < 256)
        return known.decode("utf-8", errors="replace")


def _files(root: Path, pattern: str = "*", without: Iterable[str] = ()) -> list[Path]:
    """Files under a folder that are not hidden, in a fixed random order.

    The held-out end of the stream is then a random set of files, not the alphabetically
    last folder.
    """

    def wanted(path: Path) -> bool:
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        return path.is_file() and not hidden and not set(without) & set(parts)

    files = sorted(path for path in root.rglob(pattern) if wanted(path))
    random.Random(0).shuffle(files)
    return files


def _is_text(content: bytes) -> bool:
    """Whether this is UTF-8 without NUL bytes; the file name does not matter."""
    try:
        return b"\0" not in content and bool(content.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _read_texts(files: Iterable[Path]) -> list[bytes]:
    """The content of all files that are text."""
    return list(filter(_is_text, (path.read_bytes() for path in files)))


def _read_ids(path: Path) -> np.ndarray:
    """The token ids of a ``.bin`` file, memory-mapped."""
    size = path.stat().st_size
    if not size or size % 2:
        raise InputError(
            f"--data: {path} has {size} bytes, which is not a sequence of uint16 "
            "tokens; write it as nanoGPT's prepare.py does"
        )
    return np.memmap(path, np.uint16, mode="r")


def _split(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first nine tenths, and the last."""
    cut = len(stream) * 9 // 10
    return stream[:cut], stream[cut:]


def _split_texts(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The first nine tenths of all bytes, and the last; one text may be cut in two."""
    left = sum(map(len, texts)) * 9 // 10
    first, last = [], []
    for text in texts:
        first.append(text[:left])
        last.append(text[left:])
        left = max(0, left - len(text))
    return first, last


def _encode(tokenizer: Tokenizer, texts: Iterable[bytes]) -> np.ndarray:
    """Encodes text by text, which takes less time and memory than all at once."""
    ids = (tokenizer.encode(text.decode(errors="ignore")) for text in texts)
    return np.concatenate([np.array(each, np.int32) for each in ids])


def _load_ids(path: Path, tokenizer: Tokenizer | None) -> Corpus:
    """Loads a ``.bin`` file; ``val.bin`` beside ``train.bin`` is the held-out part."""
    val = path.with_name("val.bin")
    if path.name == "train.bin" and val.is_file():
        train, held_out = _read_ids(path), _read_ids(val)
    else:
        train, held_out = _split(_read_ids(path))
    vocabulary = 1 + int(max(train.max(initial=0), held_out.max(initial=0)))
    size = None
    if tokenizer is not None:
        if vocabulary > tokenizer.vocabulary:
            problem = f"{path} has ids up to {vocabulary - 1}, but the tokenizer only"
            remedy = f"up to {tokenizer.vocabulary - 1}; give the one that made the ids"
            raise InputError(f"--tokenizer: {problem} {remedy}")
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
      context: tokens that the model reads at once; both parts must hold at least one
        window.
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
            f"and a window takes {context + 1}; give more text or a smaller --size"
        )
    return corpus


class _Windows:
    """Random access to windows; each ends with the first token of the next.

    A window predicts all its tokens but the first, so each token is predicted once per
    epoch.
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
    """Endless batches by step, int32[batch_size, context + 1], reshuffled every epoch.

    A batch depends only on the arguments and the step. A run resumes by asking for its
    next step: there is no iterator whose state must be saved.
    """
    windows = grain.MapDataset.source(_Windows(stream, context))
    shuffled = windows.shuffle(seed).repeat().batch(batch_size)
    return lambda step: np.asarray(shuffled[step])
