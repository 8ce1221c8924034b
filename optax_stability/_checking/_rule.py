"""The form of a rule: two parts, how they stand to each other, and a sentence."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from optax_stability._checking._description import Part
from optax_stability._checking._placement import Place
from optax_stability._checking._titles import title

Relation = Callable[[Place, Place], bool]
Unless = Callable[[Place, Place, Sequence[Place]], bool]


def _never(first: Place, second: Place, places: Sequence[Place]) -> bool:
    del first, second, places
    return False


class Rule(NamedTuple):
    """What may not stand where, and why.

    Attributes:
      name: name of the rule, for tests.
      first: role of the first part.
      relation: how the first place stands to the second.
      second: role of the second part.
      says: the sentence, with ``{first}`` and ``{second}`` for the two parts.
      unless: when it is no fault, from both places and all others.
    """

    name: str
    first: Callable[[Part], bool]
    relation: Relation
    second: Callable[[Part], bool]
    says: str
    unless: Unless = _never


def sentences(rule: Rule, places: Sequence[Place]) -> Iterator[str]:
    """What a rule has to say; about each part it speaks once."""
    told = set()
    for second in (each for each in places if rule.second(each.part)):
        for first in (each for each in places if rule.first(each.part)):
            if {id(first), id(second)} & told or not rule.relation(first, second):
                continue
            if not rule.unless(first, second, places):
                told |= {id(first), id(second)}
                names = {"first": title(first.part), "second": title(second.part)}
                yield rule.says.format(**names)
