"""Injects faults into a run, to show that it survives them.

A fault is written ``KIND@BATCH``, ``KIND@BATCHxLENGTH`` or ``KIND=SIZE@BATCH…``::

    nan@300         the gradient of batch 300 is NaN
    scale=1e6@300   the gradient of batch 300 is a million times as large
    bytes@300x5     batches 300 to 304 are random tokens
    surge=30@300x20 the learning rate is thirty times as large for twenty batches
    flip@300        one bit of the state after batch 300 is wrong, unless recomputed

Only ``scale`` and ``surge`` have a size.

Batches are counted from 1, and so are steps. After a rewind the two differ: a batch is
never drawn twice, and neither is its fault repeated.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The default factor of each kind; NaN if the kind takes no size.
SIZES = {"nan": math.nan, "scale": 1e4, "bytes": math.nan, "surge": 30.0}
SIZES |= {"flip": math.nan}
_FORM = re.compile(
    r"(?P<kind>[a-z]+)(=(?P<size>[0-9.e+-]+))?@(?P<first>\d+)(x(?P<length>[1-9]\d*))?"
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault in one or more consecutive batches.

    Attributes:
      kind: ``"nan"``, ``"scale"``, ``"bytes"``, ``"surge"`` or ``"flip"``.
      first: number of the first batch, from 1.
      length: number of consecutive batches.
      size: factor on the gradient or on the learning rate.
    """

    kind: str
    first: int
    length: int
    size: float

    def hits(self, batch: int) -> bool:
        """Whether the fault affects this batch."""
        return self.first <= batch < self.first + self.length


def parse(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Reads faults as they are written on the command line.

    Raises:
      ValueError: a fault cannot be read; one line about the first such fault.
    """
    return tuple(map(_parse, texts))


def _parse(text: str) -> Fault:
    found = _FORM.fullmatch(text)
    if not found or found["kind"] not in SIZES or int(found["first"]) < 1:
        kinds = ", ".join(SIZES)
        raise ValueError(
            f"{text} is not a fault; write KIND@BATCH, KIND@BATCHxLENGTH or "
            f"KIND=SIZE@BATCH, KIND one of {kinds}, BATCH and LENGTH from 1"
        )
    if found["size"] and math.isnan(SIZES[found["kind"]]):
        raise ValueError(f"{text}: {found['kind']} has no size; leave the size out")
    try:
        size = float(found["size"] or SIZES[found["kind"]])
    except ValueError as error:
        raise ValueError(f"{text}: {found['size']} is not a number") from error
    return Fault(found["kind"], int(found["first"]), int(found["length"] or 1), size)


class Injector:
    """Applies faults to the batches of a run."""

    def __init__(self, faults: Iterable[Fault], vocabulary: int):
        """Takes the faults; random tokens are below ``vocabulary``."""
        self._faults, self._vocabulary = tuple(faults), vocabulary

    def _hit(self, kind: str, batch: int) -> bool:
        return any(x.kind == kind and x.hits(batch) for x in self._faults)

    def corrupt(self, windows: np.ndarray, batch: int) -> np.ndarray:
        """The batch, or random tokens instead; they depend only on its number."""
        if not self._hit("bytes", batch):
            return windows
        random = np.random.default_rng(batch)
        return random.integers(
            self._vocabulary, size=windows.shape, dtype=windows.dtype
        )

    def factors(self, batch: int) -> dict[str, np.float32]:
        """The factors on the ``"gradient"`` and, as ``"surge"``, the learning rate."""
        active = [fault for fault in self._faults if fault.hits(batch)]
        gradient = [fault.size for fault in active if fault.kind in ("nan", "scale")]
        surge = [fault.size for fault in active if fault.kind == "surge"]
        return {
            "gradient": np.float32(math.prod(gradient)),
            "surge": np.float32(math.prod(surge)),
        }

    def flipping(self, step: Callable, batch: int) -> Callable:
        """The step, which returns a list of arrays first; its first run may flip a bit.

        Only the first: a step that is run again from the same state is right then.
        """
        wrong = [self._hit("flip", batch)]

        def faulty(*arguments):
            leaves, *others = step(*arguments)
            if wrong.pop() if wrong else False:
                first = next(i for i, x in enumerate(leaves) if x.dtype == jnp.float32)
                leaves = [*leaves[:first], _flip(leaves[first]), *leaves[first + 1 :]]
            return leaves, *others

        return faulty


def _flip(x: jax.Array) -> jax.Array:
    """Flips the lowest bit of the first entry of a float32 array."""
    word, first = x.view(jnp.uint32), (0,) * x.ndim
    return word.at[first].set(word[first] ^ 1).view(x.dtype)


def scale_gradient(loss_fn: Callable, factor: jax.Array) -> Callable:
    """The loss, with a gradient that is multiplied by a factor."""

    def faulty(model, windows):
        loss = loss_fn(model, windows)
        return loss + (factor - 1) * (loss - jax.lax.stop_gradient(loss))

    return faulty


def scale_by_surge() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument ``surge``; the last part of a chain.

    Without the argument it does nothing.
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
