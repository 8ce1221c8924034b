"""What tests break on purpose and see go on, counted for the end of their output."""

import collections

SEQUENCES, KILLS = "fault sequences survived", "kills survived"
STOPS, RESTORES = "stops gone on from", "restored states compared"

_counted: collections.Counter[str] = collections.Counter()


def count(what: str, times: int = 1) -> None:
    """To be called by a test, once it knows."""
    _counted[what] += times


def take() -> collections.Counter[str]:
    """What was counted since it was last asked."""
    taken = _counted.copy()
    _counted.clear()
    return taken
