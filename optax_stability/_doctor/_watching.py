"""Follows a log that grows: says what is new, and tells a command.

A log is read again when its size or its time changed. A finding is new if its kind was
not there when the log was read last. A log that does not exist yet is waited for.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optax_stability._diagnosis import _telling
from optax_stability._diagnosis._finding import Finding
from optax_stability._doctor import _reading
from optax_stability._doctor._examination import Examination, examine
from optax_stability._doctor._log import UnreadableError


def stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file at a path; changes when one does."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    found = []
    for each in files:
        try:
            status = each.stat()
        except OSError:
            continue  # It was there a moment ago.
        found.append((str(each), status.st_size, status.st_mtime_ns))
    return tuple(found)


def examinations(
    path: str, chosen: dict[str, str], every: float, until: float
) -> Iterator[list[Examination] | UnreadableError]:
    """What is known of the logs at a path, each time that they have changed.

    Args:
      path: a file or a folder.
      chosen: the columns that the user named.
      every: seconds between looks.
      until: when to stop, in seconds of ``time.monotonic``.
    """
    last = None
    while True:
        present = stamp(path)
        if present != last:
            last = present
            try:
                yield [examine(each) for each in _reading.read(path, chosen)]
            except UnreadableError as error:
                yield error
        if time.monotonic() + every > until:
            return
        time.sleep(every)


class News:
    """Remembers which findings were there, and gives those that are new."""

    def __init__(self) -> None:
        """Nothing was there."""
        self._last: dict[str, set[str]] = {}

    def of(self, examined: Examination) -> list[Finding]:
        """The findings of kinds that were not there last time."""
        before = self._last.get(examined.log.name, set())
        self._last[examined.log.name] = {each.kind for each in examined.findings}
        return [each for each in examined.findings if each.kind not in before]


def message(examined: Examination, finding: Finding) -> dict[str, Any]:
    """A finding, and where it comes from, in the types of JSON."""
    last = float(examined.log.history["step"][-1])
    return {"log": examined.log.name, "last_step": last, **finding._asdict()}


def tell(command: str, content: dict[str, Any]) -> None:
    """Runs a command of the user's; one that fails does not end the watch."""
    failure = _telling.tell(command, content)
    if failure is not None:
        sys.stderr.write(f"--exec {failure}; the watch goes on.\n")


def watch(
    path: str,
    chosen: dict[str, str],
    *,
    every: float,
    seconds: float,
    show: Callable[[Examination, list[Finding]], None],
    command: str | None = None,
    changed: Callable[[list[Examination]], None] | None = None,
) -> None:
    """Follows a path.

    Args:
      path: a file or a folder.
      chosen: the columns that the user named.
      every: seconds between looks.
      seconds: how long to watch; ∞ to watch until interrupted.
      show: is called with what is new.
      command: is run for each new finding.
      changed: is called with everything, whenever the log has changed.
    """
    news, complaint = News(), ""
    for examined in examinations(path, chosen, every, time.monotonic() + seconds):
        if isinstance(examined, UnreadableError):
            if str(examined) != complaint:
                complaint = str(examined)
                sys.stderr.write(f"waiting: {' '.join(complaint.split())}\n")
            continue
        complaint = ""
        for each in examined:
            new = news.of(each)
            show(each, new)
            for finding in new:
                if command is not None:
                    tell(command, message(each, finding))
        if changed is not None:
            changed(examined)
