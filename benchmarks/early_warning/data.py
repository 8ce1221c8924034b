"""Bytes of three kinds to train on, and windows of them."""

import functools

import numpy as np
from corpus import corpus, windows

from early_warning.settings import Setting


def markov_chain() -> tuple[np.ndarray, np.ndarray]:
    """Bytes, each of which follows one of a few others; train and held out."""
    rng = np.random.default_rng(0)
    # The few, and how often: rows that sum to 1.
    chances = rng.dirichlet(np.full(128, 0.05), 128).cumsum(1)
    state, rows = rng.integers(0, 128, 1000), []
    for draw in rng.random((1000, 1000)):
        state = np.minimum((chances[state] < draw[:, None]).sum(1), 127)
        rows.append(state)
    stream = np.stack(rows, 1).astype(np.uint8)
    return stream[100:].ravel(), stream[:100].ravel()


def english() -> tuple[np.ndarray, np.ndarray]:
    """What ``help()`` knows of the language, most of it prose; train and held out."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    train = b"".join(text for i, text in enumerate(texts) if i % 10)
    held_out = b"".join(texts[::10])
    return np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)


DATA = {"source code": corpus, "Markov chain": markov_chain, "English": english}


@functools.cache
def bytes_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and bytes held out."""
    return DATA[data]()


def batches_of(setting: Setting, seed: int, steps: int) -> np.ndarray:
    """int[steps, batch, 65], the same whatever the learning rate is."""
    rng = np.random.default_rng([seed, 1])
    train, _ = bytes_of(setting.data)
    return np.stack([windows(train, rng, setting.batch) for _ in range(steps)])


def held_out_of(setting: Setting) -> np.ndarray:
    """int[32, 8, 65], the same for all runs."""
    _, held_out = bytes_of(setting.data)
    return windows(held_out, np.random.default_rng(0), 256).reshape(32, 8, 65)
