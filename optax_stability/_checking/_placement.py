"""Where the parts of a chain stand to each other.

The gradient goes through a chain from the first part to the last. A wrapper gets it
first and hands it to what is inside. Groups of ``optax.partition`` stand beside each
other: none of them is behind another.
"""

import dataclasses
from collections.abc import Iterator

from optax_stability._checking._description import Part

CHAINS = ("chain", "named_chain")


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A part, and where it stands.

    Attributes:
      part: the part.
      path: from the outermost part inwards, each part around it and the number of the
        child that leads to it.
    """

    part: Part
    path: tuple[tuple[Part, int], ...] = ()

    @property
    def around(self) -> list[Part]:
        """The wrappers around this part, the outermost first; chains are none."""
        return [part for part, _ in self.path if part.name not in CHAINS]


def places_in(place: Place) -> Iterator[Place]:
    """This place and all places inside it, in the order of the gradient."""
    yield place
    for i, part in enumerate(place.part.parts):
        yield from places_in(Place(part, (*place.path, (place.part, i))))


def is_inside(first: Place, second: Place) -> bool:
    """Whether the first place is within the second, a wrapper or a group of it."""
    return any(part is second.part for part, _ in first.path)


def is_behind(first: Place, second: Place) -> bool:
    """Whether the gradient goes through the second place before the first."""
    for (part, i), (_, j) in zip(first.path, second.path, strict=False):
        if i != j:
            return part.name in CHAINS and i > j
    return False


def is_in_front_of(first: Place, second: Place) -> bool:
    """Whether the gradient goes through the first place before the second."""
    return is_behind(second, first)


def is_apart_from(first: Place, second: Place) -> bool:
    """Whether both are in one chain and neither is inside the other."""
    return is_behind(first, second) or is_behind(second, first)


def is_between(place: Place, first: Place, second: Place) -> bool:
    """Whether the gradient meets a place after the first and no later than the second.

    A wrapper around the second place counts as between.
    """
    reached = is_behind(second, place) or is_inside(second, place)
    return reached and is_behind(place, first)
