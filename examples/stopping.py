"""Stops a run between two steps, when somebody or the scheduler asks for it."""

import signal
import threading
from types import FrameType
from typing import Self


class StopRequest:
    """Within a ``with`` block, Ctrl-C and SIGTERM are noted, and nothing is torn apart.

    ``requested`` becomes the name of the signal. A second one acts at once, as usual.
    Python lets only its main thread take signals: in another one nothing is noted.
    """

    def __init__(self):
        """Nothing was requested yet."""
        self.requested = ""
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        self._hand_back()

    def _hand_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> Self:
        """Takes over both signals, but for one that is not Python's to hand back."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for each in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(each)
            if before is not None:
                self._before[each] = before
                signal.signal(each, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the signals as they were."""
        self._hand_back()
