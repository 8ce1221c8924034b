"""Turns files on this computer into batches of tokens; nothing is downloaded.

Text is read as bytes, one token each, or split into tokens by a tokenizer file on disk:
a ``tokenizer.json`` of Hugging Face's tokenizers, or a ``*.tiktoken`` file of ranks. A
``.bin`` file holds token ids, as nanoGPT or llm.c write them.
"""

import base64
import bisect
import dataclasses
import importlib.util
import itertools
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import numpy as np
from console import count
from inputs import InputError

_NOT_LIBRARY = {"site-packages", "dist-packages", "idlelib", "lib2to3", "test", "tests"}

# How files of the usual compressed formats start.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
# The headers of llm.c: magic number and version, and the type of the ids behind it.
_LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
_HEADER = 1024
_PART = 1 << 24  # Ids that are looked at together.

# How tiktoken splits text before it merges bytes: GPT-4's cl100k_base.
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
        problem = f"is not a {package} file: {error}".partition("\n")[0]
        raise InputError(f"--tokenizer: {path} {problem}") from error


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
      decode: token ids → text; it leaves out ids that only the model has.
      bytes_per_token: mean of the held-out part; None if no tokenizer is known.
      files: names of the files, and where in the stream each starts.
      left_out: what was left out, and why, as sentences.
    """

    name: str
    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    unit: str
    decode: Callable[[Sequence[int]], str]
    bytes_per_token: float | None
    files: tuple[tuple[str, int], ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name and size."""
        return f"{self.name}, {count(len(self.train))} {self.unit}s"

    def origin(self, position: int) -> str:
        """The file of a token to train on, and its offset there."""
        at = bisect.bisect_right(self.files, position, key=lambda file: file[1]) - 1
        name, start = self.files[at]
        return f"{name}, {self.unit} {position - start}"


def _decode_bytes(tokens: Sequence[int]) -> str:
    known = bytes(token for token in tokens if token < 256)
    return known.decode("utf-8", errors="replace")


def _as_numbers(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens)) + " "


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


def _why_no_text(content: bytes) -> str | None:
    """Why this is not text; None for UTF-8 without NUL bytes, whatever its name is."""
    if content.startswith(_COMPRESSED):
        return "it is compressed"
    if b"\0" in content:
        return f"it has a NUL byte at offset {content.index(0)}"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = content[error.start]
        return f"it is not UTF-8: byte 0x{bad:02x} at offset {error.start}"
    return None if content else "it is empty"


def _read_texts(files: Iterable[Path]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The content of the files that are text, and why the others are not."""
    texts, refused = {}, {}
    for path in files:
        content = path.read_bytes()
        why = _why_no_text(content)
        if why is None:
            texts[str(path)] = content
        else:
            refused[str(path)] = why
    return texts, refused


def _read_ids(path: Path) -> tuple[np.ndarray, int]:
    """The token ids of a ``.bin`` file, memory-mapped, and the bytes before them."""

    def refuse(problem: str) -> InputError:
        remedy = "write uint16 tokens, as nanoGPT's prepare.py does"
        return InputError(f"--data: {path} {problem}; {remedy}")

    size = path.stat().st_size
    head = np.fromfile(path, np.uint8, 4096).tobytes()
    if not size or size % 2:
        raise refuse(f"has {size} bytes, which is not a sequence of uint16 tokens")
    if not head.translate(None, string.printable.encode()):
        raise refuse("is text, not token ids")
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), np.int32)
    dtype = _LLM_C.get((int(magic), int(version)))
    if dtype is not None:
        if size != _HEADER + count * np.dtype(dtype).itemsize:
            raise refuse(f"has {size} bytes, but its header says {count} tokens")
        return np.memmap(path, dtype, mode="r", offset=_HEADER), _HEADER
    # 32 or 64 bits per id: the upper halves of all ids are (nearly) 0.
    words = np.frombuffer(head[: len(head) // 8 * 8], np.uint16).reshape(-1, 4)
    for dtype in (np.uint64, np.uint32):
        step = np.dtype(dtype).itemsize // 2
        low, high = words[:, ::step], np.delete(words, np.s_[::step], axis=1)
        if low.size and low.max() > 255 and high.max() < 16:
            if size % np.dtype(dtype).itemsize:
                raise refuse(f"looks like {np.dtype(dtype)} ids, and is cut off")
            return np.memmap(path, dtype, mode="r"), 0
    return np.memmap(path, np.uint16, mode="r"), 0


def _check_ids(path: Path, ids: np.ndarray) -> int:
    """The number of ids up to the highest; refuses one far above all others."""
    parts = [ids[i : i + _PART] for i in range(0, len(ids), _PART)]
    top = max(int(part.max()) for part in parts)
    if top >= 2**20:
        problem = f"has a token id of {top}, which no vocabulary has"
        raise InputError(f"--data: {path} {problem}; write uint16 tokens")
    counts = np.zeros(top + 1, np.int64)
    for part in parts:
        counts += np.bincount(part.astype(np.int64), minlength=top + 1)
    used = np.flatnonzero(counts)
    below = used[used < used[-1] // 2]
    rare = counts[used[-1] // 2 :].sum() <= max(1, len(ids) // 1000)
    if len(below) and top > 1000 and rare:
        i = next(i for i, part in enumerate(parts) if part.max() == top)
        where = i * _PART + int(np.argmax(parts[i] == top))
        problem = f"has id {top} at token {where}, far above nearly all others"
        remedy = "mend the file, or give the --tokenizer that made it"
        end = f"which end at {below[-1]}"
        raise InputError(f"--data: {path} {problem}, {end}; {remedy}")
    return top + 1


def _split_texts(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The first nine tenths of all bytes, and the last; one text may be cut in two."""
    left = sum(map(len, texts)) * 9 // 10
    first, last = [], []
    for text in texts:
        first.append(text[:left])
        last.append(text[left:])
        left = max(0, left - len(text))
    return first, last


def _encode(tokenizer: Tokenizer, texts: Iterable[bytes]) -> list[np.ndarray]:
    """Encodes text by text, which takes less time and memory than all at once."""
    ids = (tokenizer.encode(text.decode(errors="ignore")) for text in texts)
    return [np.array(each, np.int32) for each in ids]


def _load_ids(path: Path, tokenizer: Tokenizer | None) -> Corpus:
    """Loads a ``.bin`` file; ``val.bin`` beside ``train.bin`` is the held-out part."""
    val = path.with_name("val.bin")
    ids, header = _read_ids(path)
    if path.name == "train.bin" and val.is_file():
        train, held_out = ids, _read_ids(val)[0]
    else:
        train, held_out = np.split(ids, [len(ids) * 9 // 10])
    if tokenizer is None:
        decode, size = _as_numbers, None
        vocabulary = max(_check_ids(*each) for each in ((path, train), (val, held_out)))
    else:
        vocabulary = 1 + int(max(train.max(initial=0), held_out.max(initial=0)))
        if vocabulary > tokenizer.vocabulary:
            problem = f"{path} has ids up to {vocabulary - 1}, but the tokenizer only"
            remedy = f"up to {tokenizer.vocabulary - 1}; give the one that made the ids"
            raise InputError(f"--tokenizer: {problem} {remedy}")
        vocabulary, decode = tokenizer.vocabulary, tokenizer.decode
        part = held_out[:100_000].tolist()
        size = len(decode(part).encode()) / max(1, len(part))
    note = f"{path}: {ids.dtype} ids" + " behind a header of llm.c" * bool(header)
    notes = (note,) if header or ids.dtype != np.uint16 else ()
    parts = train, held_out, vocabulary, "token", decode, size
    return Corpus(path.name, *parts, ((str(path), 0),), notes)


def _say_left_out(refused: dict[str, str]) -> tuple[str, ...]:
    """Sentences about the files of a folder that are not text, by reason."""
    by_kind: dict[str, list[str]] = {}
    for name, why in refused.items():
        by_kind.setdefault(re.split(":| at ", why)[0], []).append(name)
    return tuple(
        f"left out {first}{f' and {len(more)} more' * bool(more)}: {refused[first]}"
        for first, *more in by_kind.values()
    )


def _load_text(path: Path | None, tokenizer: Tokenizer | None) -> Corpus:
    if path is None:
        library, refused = Path(sysconfig.get_paths()["stdlib"]), {}
        name = "Python's standard library"
        found = _read_texts(_files(library, "*.py", without=_NOT_LIBRARY))[0]
    else:
        name = path.resolve().name
        found, refused = _read_texts(_files(path) if path.is_dir() else [path])
        if not found and refused and not path.is_dir():
            remedy = "give a text file in UTF-8"
            raise InputError(f"--data: {path}: {refused[str(path)]}; {remedy}")
    if not found:
        raise InputError(f"--data: no UTF-8 text in {path or name}; give a text file")
    *firsts, last = found.values()
    texts = [*(text + b"\n" for text in firsts), last]
    parts = _split_texts(texts)
    if tokenizer is None:
        train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
        lengths, known = map(len, texts), (256, "byte", _decode_bytes, 1.0)
    else:
        encoded = [_encode(tokenizer, part) for part in parts]
        train, held_out = map(np.concatenate, encoded)
        lengths = map(len, encoded[0])
        size = sum(map(len, parts[1])) / max(1, len(held_out))
        known = tokenizer.vocabulary, "token", tokenizer.decode, size
    starts = itertools.accumulate(lengths, initial=0)
    files = tuple(zip(found, starts, strict=False))
    return Corpus(name, train, held_out, *known, files, _say_left_out(refused))


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


class Windows:
    """Endless batches of windows by index, reshuffled every epoch.

    Each window ends with the first token of the next and predicts all its tokens but
    the first, so each token is predicted once per epoch. A batch depends only on the
    arguments and its index: there is no iterator whose state must be saved.
    """

    def __init__(self, stream: np.ndarray, context: int, batch_size: int, seed: int):
        """Takes a stream of tokens."""
        self._stream, self._context = stream, context
        numbers = grain.MapDataset.range((len(stream) - 1) // context)
        self._numbers = numbers.shuffle(seed).repeat().batch(batch_size)

    def starts(self, index: int) -> np.ndarray:
        """Where in the stream the windows of a batch start."""
        return np.asarray(self._numbers[index]) * self._context

    def __call__(self, index: int) -> np.ndarray:
        """A batch, int32[batch_size, context + 1]."""
        at = self.starts(index)[:, None] + np.arange(self._context + 1)
        return self._stream[at].astype(np.int32)
