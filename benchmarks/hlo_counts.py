"""What a compiled program costs a device, counted in its text.

XLA's text of an optimized program names every kernel with the arrays that it reads and
writes. So no device is needed to count kernels, traffic and questions to the host:

*kernel*: an instruction that runs on its own. Tuples, bitcasts, and copies that the
hardware makes in the background are none; nor are instructions on single numbers on a
TPU, whose scalar unit runs them beside the others.

*bytes*: every kernel reads each of its arrays once, whole, and writes its results.
Arrays in the memory of the chip (VMEM) are free, and an update of a few rows in place
moves those rows only.

*asks*: a loop whose length XLA does not know, or a conditional: the host of a GPU reads
its condition while the device waits.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"opt-barrier", "optimization-barrier", "partition-id", "replica-id", "domain"}
_FREE |= {"add-dependency", "call", "while", "conditional", "copy-start", "slice-start"}
_FREE |= {"async-start", "async-update"}
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line of a computation: ``name = shape operation(operands), attributes``."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str

    def called(self) -> list[str]:
        """The computations that a loop, a conditional or a call runs."""
        found = re.findall(r"(?:body|to_apply)=%?([\w.\-]+)", self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            found += [each.strip().lstrip("%") for each in branches[1].split(",")]
        pair = r"(?:true|false)_computation=%?([\w.\-]+)"
        return found + re.findall(pair, self.attributes)

    def passes(self) -> int | None:
        """How often a loop runs, if XLA knows it."""
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(count[1]) if count else None


class Counts(NamedTuple):
    """What a program costs.

    Attributes:
      kernels: kernels in one run in which no condition holds; loops count each pass.
      asks: loops of unknown length and conditionals that such a run meets.
      bytes: moved outside all loops and conditionals.
    """

    kernels: int
    asks: int
    bytes: int


def _split(text: str) -> tuple[str, str]:
    """The first shape of a line, which may be a tuple, and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text, 0)
    return text[: end + 1], text[end + 1 :].lstrip()


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if not named:
        return None
    shape, rest = _split(line[named.end() :])
    operation = re.match(r"([\w\-]+)\(", rest)
    if not operation:
        return None
    end = _closing(rest, operation.end() - 1)
    operands = re.findall(r"%([\w.\-]+)", rest[operation.end() : end])
    return Instruction(
        named[1], shape, operation[1], tuple(dict.fromkeys(operands)), rest[end + 1 :]
    )


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a module by name, and the name of its entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _instruction(line)
            if found:
                current[found.name] = found
    return computations, entry


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it lies in the device's memory."""
    for kind, dims, layout in _ARRAY.findall(shape):
        if kind in _BYTES:
            entries = math.prod(map(int, filter(None, dims.split(","))))
            yield _BYTES[kind] * entries, not re.search(r"S\([1-9]", layout)


def _size(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the memory of the device."""
    return sum(size for size, in_memory in _arrays(shape) if in_memory)


def _is_scalar(shape: str) -> bool:
    return all(not dims for _, dims, _ in _ARRAY.findall(shape))


class _Program:
    """Counts in the computations of one module."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        # In the text of a TPU every array has a tiled layout.
        self.on_tpu = "{:T(" in text or ":T(" in text

    def is_kernel(self, each: Instruction, table: dict[str, Instruction]) -> bool:
        """Whether an instruction runs on its own."""
        if each.operation in _FREE or each.operation.endswith("-done"):
            return False
        if each.operation == "custom-call" and "ConcatBitcast" in each.attributes:
            return False
        shapes = [each.shape, *(table[x].shape for x in each.operands if x in table)]
        return not (self.on_tpu and all(map(_is_scalar, shapes)))

    def updated_rows(self, each: Instruction) -> int | None:
        """Bytes that an update of a few rows in place writes; None if it is none."""
        called = re.search(r"calls=%?([\w.\-]+)", each.attributes)
        if each.operation != "fusion" or not called:
            return None
        inside = self.computations[called[1]]
        last = list(inside.values())[-1]
        if last.operation != "dynamic-update-slice":
            return None
        return _size(inside[last.operands[1]].shape)

    def bytes_of(self, each: Instruction, table: dict[str, Instruction]) -> int:
        """What an instruction reads and writes."""
        if each.operation in ("copy-start", "slice-start"):
            # The smallest array is what moves, from and to one memory or another.
            ends = list(_arrays(each.shape.replace("u32[]", "")))
            return min(size for size, _ in ends) * sum(there for _, there in ends[:2])
        if not self.is_kernel(each, table):
            return 0
        reads = [_size(table[name].shape) for name in each.operands if name in table]
        rows = self.updated_rows(each)
        if rows is None:
            return _size(each.shape) + sum(reads)
        return rows + sum(reads) - max(reads)

    def count(self, name: str) -> Counts:
        """Counts of one computation and those it runs."""
        table = self.computations[name]
        kernels = asks = moved = 0
        for each in table.values():
            if each.operation == "while" and each.passes() is not None:
                inner = self.count(each.called()[0])
                passes = each.passes() or 0
                kernels, asks = kernels + passes * inner.kernels, asks + inner.asks
            elif each.operation in ("while", "conditional"):
                asks += 1
            elif each.operation == "call":
                inner = [self.count(called) for called in each.called()]
                kernels += sum(found.kernels for found in inner)
                asks += sum(found.asks for found in inner)
                moved += sum(found.bytes for found in inner)
            else:
                kernels += self.is_kernel(each, table)
                moved += self.bytes_of(each, table)
        return Counts(kernels, asks, moved)


def count(text: str) -> Counts:
    """What one run of a program costs in which no condition holds."""
    program = _Program(text)
    return program.count(program.entry)


def collectives(text: str) -> dict[str, int]:
    """The largest array that each kind of exchange between devices moves, in bytes."""
    largest: collections.Counter[str] = collections.Counter()
    for table in parse(text)[0].values():
        for each in table.values():
            for kind in COLLECTIVES:
                if each.operation in (kind, f"{kind}-start"):
                    size = max((size for size, _ in _arrays(each.shape)), default=0)
                    largest[kind] = max(largest[kind], size)
    return dict(largest)
