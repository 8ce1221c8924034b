"""Text that every machine has: the sources of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path

import numpy as np


def join(files: list[Path]) -> np.ndarray:
    """All bytes of some files."""
    return np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and bytes held out: the top folder of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    held_out, train = files[::10], [f for i, f in enumerate(files) if i % 10]
    return join(train), join(held_out)


def windows(stream: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random windows of 65 bytes."""
    starts = rng.integers(0, len(stream) - 65, count)
    return stream[starts[:, None] + np.arange(65)].astype(np.int32)
