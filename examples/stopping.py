"""Stops a run between two steps, when somebody or the scheduler asks for it."""

import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within a ``with`` block, Ctrl-C and SIGTERM are noted, and nothing is torn apart.

    ``requested`` becomes the name of the signal. A second one acts at once, as usual.
    Python lets only its main thread take signals: in another one nothing is noted.

    Of several processes that train together any one may be asked. JAX itself waits for
    SIGTERM there, and tells the others, so that all stop after the same step.
    """

    def __init__(self):
        """Nothing was requested yet."""
        self.requested = ""
        self._alone, self._asked = jax.process_count() == 1, 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._hand_back()
        if self._alone:
            self.requested = signal.Signals(number).name
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Whether to stop here; to be asked after every step, by all processes."""
        self._asked += 1
        if not self._alone and multihost_utils.reached_preemption_sync_point(
            self._asked
        ):
            self.requested = "SIGTERM"
        return bool(self.requested)

    def _hand_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> Self:
        """Takes over both signals, but for one that is not Python's to hand back."""
        if threading.current_thread() is not threading.main_thread():
            return self
        ours = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        for each in ours:
            before = signal.getsignal(each)
            if before is not None:
                self._before[each] = before
                signal.signal(each, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the signals as they were."""
        self._hand_back()
