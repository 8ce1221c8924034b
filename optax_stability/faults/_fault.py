"""A fault, as it is written on a command line."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# The default factor of each kind; NaN if the kind takes no size.
_SIZES = {"nan": math.nan, "scale": 1e4, "bytes": math.nan}
_SIZES |= {"surge": 30.0, "flip": math.nan}
_FORM = re.compile(
    r"(?P<kind>[a-z]+)(=(?P<size>[0-9.e+-]+))?@(?P<first>\d+)(x(?P<length>[1-9]\d*))?"
)


class Fault(NamedTuple):
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


def _parse(text: str) -> Fault:
    found = _FORM.fullmatch(text)
    if not found or found["kind"] not in _SIZES or int(found["first"]) < 1:
        kinds = ", ".join(_SIZES)
        raise ValueError(
            f"{text} is not a fault; write KIND@BATCH, KIND@BATCHxLENGTH or "
            f"KIND=SIZE@BATCH, KIND one of {kinds}, BATCH and LENGTH from 1"
        )
    if found["size"] and math.isnan(_SIZES[found["kind"]]):
        raise ValueError(f"{text}: {found['kind']} has no size; leave the size out")
    try:
        size = float(found["size"] or _SIZES[found["kind"]])
    except ValueError as error:
        raise ValueError(f"{text}: {found['size']} is not a number") from error
    return Fault(found["kind"], int(found["first"]), int(found["length"] or 1), size)


def parse_faults(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Reads faults that are written ``KIND@BATCH``, for a flag of a trainer.

    ===================  ===============================================================
    ``nan@300``          the gradient of batch 300 is NaN
    ``scale=1e6@300``    the gradient of batch 300 is a million times as large
    ``bytes@300x5``      batches 300 to 304 are random tokens
    ``surge=30@300x20``  the learning rate is thirty times as large for twenty batches
    ``flip@300``         one bit of the state after batch 300 is wrong
    ===================  ===============================================================

    Batches are counted from 1. Only ``scale`` and ``surge`` have a size, by default 1e4
    and 30.

    Args:
      texts: the faults.

    Returns:
      The faults, in the same order.

    Raises:
      ValueError: a fault cannot be read; one line about the first such fault.

    Example:
      >>> parse_faults(["surge=30@300x20"])
      (Fault(kind='surge', first=300, length=20, size=30.0),)
    """
    return tuple(map(_parse, texts))
