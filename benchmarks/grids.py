"""What is broken, how, and for whom: the rows and columns of every grid.

The random numbers of a row come from its place: new rows go to the end.
"""

import functools
import math
from typing import Any, NamedTuple

from contenders import (
    ACCUMULATORS,
    BRANCHES,
    CLIP,
    MUONS,
    OURS,
    PARTS,
    PEERS,
    Optimizer,
    clipped,
    guarded,
)
from faulty_streams import (
    Change,
    Setting,
    at,
    backwards,
    both,
    half_random,
    multiplied,
    new_domain,
    nothing,
    one_entry,
    other_batches,
    prose,
    random_bytes,
    repeated_byte,
    shifted_labels,
    shuffled,
    wide_characters,
)

EARLY, LATE = 45, 120


class Fault(NamedTuple):
    """One row of the grid.

    Attributes:
      change: what happens to the stream.
      against: the row that the result is compared with, of the same optimizer; where
        there is none, with clip and adamw in the same row.
      good: whether nothing is wrong with the data, so that every skip is a false one.
      noise: whether the result shows by how much a run moves without a reason.
      since: the call from which on the data are others and stay so: what is evaluated
        then are the parameters in use, and how long they take to follow.
    """

    change: Change
    against: str | None = "clean"
    good: bool = False
    noise: bool = False
    since: int | None = None


ALL, FROM_LATE = slice(None), slice(LATE, None)
CORRUPTED = {
    "1 random batch at 45": Fault(random_bytes(at(EARLY))),
    "5 random batches at 45": Fault(random_bytes(at(EARLY, 5))),
    "20 random batches at 45": Fault(random_bytes(at(EARLY, 20))),
    "1 random batch at 120": Fault(random_bytes(at(LATE))),
    "5 random batches at 120": Fault(random_bytes(at(LATE, 5))),
    "20 random batches at 120": Fault(random_bytes(at(LATE, 20))),
}
CLEAN = {"clean": Fault(nothing, against=None, good=True)}
NO_FAULT = {
    "gradients × 10 from 120 on": Fault(multiplied(10, FROM_LATE), good=True),
    "new domain from 120 on": Fault(new_domain(FROM_LATE), against=None, good=True),
}
NOISE = {
    f"another batch at {call}": Fault(other_batches(at(call)), good=True, noise=True)
    for call in (12, EARLY, LATE)
}
FAULTS = {
    "NaN at 12": Fault(multiplied(math.nan, at(12))),
    "NaN at 120": Fault(multiplied(math.nan, at(LATE))),
    "Inf at 120": Fault(multiplied(math.inf, at(LATE))),
    "7 NaN at 120": Fault(multiplied(math.nan, at(LATE, 7))),
    "one entry 1e20 at 120": Fault(one_entry(1e20, at(LATE))),
    "gradient × 1e3 at 120": Fault(multiplied(1e3, at(LATE))),
    "gradient × 1e6 at 120": Fault(multiplied(1e6, at(LATE))),
}
SCALES = {
    "gradients × 0.02": Fault(multiplied(0.02, ALL), good=True),
    "gradients × 0.02, one of them × 30": Fault(
        both(multiplied(0.02, ALL), multiplied(30, at(LATE))), "gradients × 0.02"
    ),
    "loss scale 1e-4": Fault(multiplied(1e-4, ALL), good=True),
    "loss scale 1e-12": Fault(multiplied(1e-12, ALL), good=True),
    "loss scale 1e-20": Fault(multiplied(1e-20, ALL), good=True),
}

# Where the clip belongs if the update is orthogonal whatever the gradient's size.
AROUND_MUON = {
    "NaN at 120": FAULTS["NaN at 120"],
    "5 random batches at 45": CORRUPTED["5 random batches at 45"],
    "5 random batches at 120": CORRUPTED["5 random batches at 120"],
    "gradient × 1e4 at 120": Fault(multiplied(1e4, at(LATE))),
}

# Whether a step can be taken back: faults at other times, of other lengths and kinds,
# and what is no fault.
KINDS = {
    "30 % of the bytes random": functools.partial(random_bytes, share=0.3),
    "half of the rows random": half_random,
    "one byte repeated": repeated_byte,
    "bytes shuffled": shuffled,
    "labels shifted by one": shifted_labels,
}
STRETCHES = {
    f"{length} random batches at {call}": Fault(random_bytes(at(call, length)))
    for call, length in (
        *((26, 5), (45, 5), (45, 20), (80, 20), (200, 20)),
        *((120, 2), (120, 5), (120, 10), (120, 20), (120, 50), (100, 100), (35, 200)),
    )
}
OTHER_KINDS = {
    f"{name}, {length} at 120": Fault(corrupt(at(LATE, length)))
    for name, corrupt in KINDS.items()
    for length in ((5, 20) if corrupt is repeated_byte else (20,))
}
TWICE = {
    f"{length} random batches at {first} and {second}": Fault(
        both(random_bytes(at(first, length)), random_bytes(at(second, length)))
    )
    for first, second, length in ((120, 130, 5), (100, 130, 20), (80, 180, 20))
}


def shift(since: int, **options: Any) -> Fault:
    """The data are others from then on."""
    change = new_domain(slice(since, None), **options)
    return Fault(change, against=None, good=True, since=since)


SHIFTS = {
    "base64 from 120 on": shift(LATE),
    "prose from 120 on": shift(LATE, kind=prose),
    "UTF-16 from 120 on": shift(LATE, kind=wide_characters),
    "backwards from 120 on": shift(LATE, kind=backwards),
    "base64, within 60 calls": shift(LATE, over=60),
    "UTF-16, within 60 calls": shift(LATE, kind=wide_characters, over=60),
    "10 of base64, 10 of text": shift(100, block=10),
    "1 % of base64": shift(60, share=0.01),
    "10 % of base64": shift(60, share=0.1),
    "50 % of base64": shift(60, share=0.5),
}
# What five lost steps cost by themselves, where they are dearest.
LOST = {"5 NaN at 45": Fault(multiplied(math.nan, at(EARLY, 5)))}


class Grid(NamedTuple):
    """Faults × optimizers on one kind of run."""

    setting: Setting
    faults: dict[str, Fault]
    optimizers: dict[str, Optimizer]
    seeds: int = 4


MICROBATCH = at(8 * LATE + 3)
GRIDS = {
    "small": Grid(
        Setting(),
        CLEAN | NOISE | FAULTS | CORRUPTED | SCALES | NO_FAULT | LOST,
        PEERS | {OURS: guarded} | PARTS,
    ),
    "branch": Grid(
        Setting(),
        CLEAN
        | STRETCHES
        | OTHER_KINDS
        | TWICE
        | SHIFTS
        | {"gradients × 10 from 120 on": NO_FAULT["gradients × 10 from 120 on"]},
        BRANCHES,
        seeds=8,
    ),
    "branch_large": Grid(
        Setting(layers=7, width=128),
        CLEAN
        | {
            name: (STRETCHES | SHIFTS)[name]
            for name in (
                "5 random batches at 120",
                "20 random batches at 120",
                "50 random batches at 120",
                "base64 from 120 on",
            )
        },
        {name: BRANCHES[name] for name in (CLIP, "branch")},
    ),
    "large": Grid(
        Setting(layers=7, width=128),
        CLEAN
        | {
            name: (FAULTS | CORRUPTED | NO_FAULT)[name]
            for name in (
                "NaN at 120",
                "5 random batches at 45",
                "5 random batches at 120",
                "20 random batches at 120",
                "new domain from 120 on",
            )
        },
        {name: PEERS[name] for name in (CLIP, "MaxText, OLMo skip")} | {OURS: guarded},
    ),
    "microbatches": Grid(
        Setting(batch=1, calls=8 * 240, calls_per_step=8),
        CLEAN
        | {
            "one microbatch NaN": Fault(multiplied(math.nan, MICROBATCH)),
            "one microbatch × 1e3": Fault(multiplied(1e3, MICROBATCH)),
            "one microbatch random": Fault(random_bytes(MICROBATCH)),
        },
        ACCUMULATORS,
    ),
    # With updates as large as those of AdamW, at the best rate of both.
    "muon": Grid(Setting(learning_rate=1e-2), CLEAN | AROUND_MUON, MUONS),
}
QUICK = Grid(
    Setting(calls=120),
    CLEAN | {"NaN at 12": FAULTS["NaN at 12"]},
    {CLIP: clipped, OURS: guarded},
    1,
)
