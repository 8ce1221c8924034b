"""Stops a run between two steps, when the user or the scheduler asks for it."""

import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within a ``with`` block, Ctrl-C and SIGTERM only set ``requested``.

    ``requested`` becomes the name of the signal. A second signal acts at once, as
    usual. Python handles signals only in its main thread: in another thread the block
    does nothing.

    If several processes train together, any of them may receive the signal. JAX itself
    handles SIGTERM there and informs the others, so that all stop after the same step.
    """

    def __init__(self):
        """Starts without a request."""
        self.requested = ""
        self._alone, self._calls = jax.process_count() == 1, 0
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._restore_handlers()
        if self._alone:
            self.requested = signal.Signals(number).name
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def due(self) -> bool:
        """Whether to stop here; all processes must call it after every step."""
        self._calls += 1
        if not self._alone and multihost_utils.reached_preemption_sync_point(
            self._calls
        ):
            self.requested = "SIGTERM"
        return bool(self.requested)

    def _restore_handlers(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __enter__(self) -> Self:
        """Installs the handlers, except over one that Python could not restore."""
        if threading.current_thread() is not threading.main_thread():
            return self
        ours = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        for each in ours:
            previous = signal.getsignal(each)
            if previous is not None:
                self._previous[each] = previous
                signal.signal(each, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous handlers."""
        self._restore_handlers()
