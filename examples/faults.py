"""Faults on purpose, so that anyone can watch a run survive them.

A fault is written ``KIND@BATCH``, ``KIND@BATCHxLENGTH`` or ``KIND=SIZE@BATCH…``::

    nan@300         the gradient of batch 300 is NaN
    scale=1e6@300   the gradient of batch 300 is a million times as large
    bytes@300x5     batches 300 to 304 are random tokens
    surge=30@300x20 the learning rate is thirty times as large for twenty batches

Only ``scale`` and ``surge`` have a size.

Batches are counted from 1, as steps are. After a rewind they are not: a batch that was
skipped does not come again, and so neither does its fault.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import jax
import numpy as np
import optax

# What a fault multiplies by, unless it says a size of its own.
SIZES = {"nan": float("nan"), "scale": 1e4, "bytes": float("nan"), "surge": 30.0}
_FORM = re.compile(
    r"(?P<kind>[a-z]+)(=(?P<size>[0-9.e+-]+))?@(?P<first>\d+)(x(?P<length>[1-9]\d*))?"
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that happens to a row of batches.

    Attributes:
      kind: ``"nan"``, ``"scale"``, ``"bytes"`` or ``"surge"``.
      first: number of the first batch, from 1.
      length: how many batches in a row.
      size: the factor on the gradient or on the learning rate.
    """

    kind: str
    first: int
    length: int
    size: float

    def hits(self, batch: int) -> bool:
        """Whether it happens to this batch."""
        return self.first <= batch < self.first + self.length


def parse(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Faults as they are written on a command line.

    Raises:
      ValueError: with one line about the first that cannot be read.
    """
    return tuple(map(_parse, texts))


def _parse(text: str) -> Fault:
    found = _FORM.fullmatch(text)
    if not found or found["kind"] not in SIZES or int(found["first"]) < 1:
        kinds = ", ".join(SIZES)
        raise ValueError(
            f"{text} is no fault; write KIND@BATCH, KIND@BATCHxLENGTH or "
            f"KIND=SIZE@BATCH, KIND one of {kinds}, BATCH and LENGTH from 1"
        )
    if found["size"] and math.isnan(SIZES[found["kind"]]):
        raise ValueError(f"{text}: {found['kind']} has no size; leave it away")
    try:
        size = float(found["size"] or SIZES[found["kind"]])
    except ValueError as error:
        raise ValueError(f"{text}: {found['size']} is no number") from error
    return Fault(found["kind"], int(found["first"]), int(found["length"] or 1), size)


class Injector:
    """Does to each batch what the faults say."""

    def __init__(self, faults: Iterable[Fault], vocabulary: int):
        """Random tokens are below ``vocabulary``."""
        self._faults, self._vocabulary = tuple(faults), vocabulary

    def corrupt(self, windows: np.ndarray, batch: int) -> np.ndarray:
        """The batch, or random tokens in its place: for one batch always the same."""
        if not any(
            fault.kind == "bytes" and fault.hits(batch) for fault in self._faults
        ):
            return windows
        random = np.random.default_rng(batch)
        return random.integers(
            self._vocabulary, size=windows.shape, dtype=windows.dtype
        )

    def factors(self, batch: int) -> dict[str, np.float32]:
        """What to multiply the ``"gradient"`` and, as ``"surge"``, the rate with."""
        now = [fault for fault in self._faults if fault.hits(batch)]
        gradient = [fault.size for fault in now if fault.kind in ("nan", "scale")]
        surge = [fault.size for fault in now if fault.kind == "surge"]
        return {
            "gradient": np.float32(math.prod(gradient)),
            "surge": np.float32(math.prod(surge)),
        }


def scale_by_surge() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument ``surge``; stands last in a chain.

    Where none is given it does nothing.
    """

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, *, surge=None, **extra_args):
        del params, extra_args
        if surge is None:
            return updates, state
        return jax.tree.map(lambda u: (u * surge).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
