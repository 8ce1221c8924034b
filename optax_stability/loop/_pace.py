"""How long a step takes, without the pauses in which something else is done."""

import time


class Pace:
    """The seconds per step, averaged over the last steps."""

    def __init__(self) -> None:
        """Starts without an average: the first step compiles, and is not counted."""
        self._last: float | None = None
        self._seconds: float | None = None

    def pause(self) -> None:
        """Leaves out the time from here to the next step."""
        self._last = None

    def step(self) -> float | None:
        """Counts a finished step; returns the seconds per step, if known."""
        now, before = time.perf_counter(), self._seconds
        if self._last is not None:
            # At least something: a coarse clock may stand still.
            took = max(now - self._last, 1e-9)
            self._seconds = took if before is None else 0.9 * before + 0.1 * took
        self._last = now
        return self._seconds
