"""Stops a run between two steps, when the user or the scheduler asks for it.

*Problem*: Ctrl-C and SIGTERM end a Python process wherever it is: in the middle of a
step, before its checkpoint. *Where*: around the training loop. *Cost*: none.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within a ``with`` block, Ctrl-C and SIGTERM only set ``requested``.

    ``requested`` becomes the name of the signal. The loop calls :meth:`due` after every
    step, and saves a checkpoint when it is true. A second signal acts at once.

    **Guarantees**

    * The first signal interrupts nothing; after the block, also after an error, signals
      act as before it.
    * With ``at_once``, a second signal acts even while JAX compiles.

    **Edge cases**: Python handles signals only in its main thread: in another thread
    the block does nothing. If several processes train together, any of them may receive
    the signal. JAX itself handles SIGTERM there and informs the others, so that all
    stop after the same step.

    Args:
      at_once: called for a second signal, in a thread of its own; a script may end the
        process there with ``os._exit(130)``. Without it, a second signal acts as
        before the block: Ctrl-C raises KeyboardInterrupt, once JAX returns.

    Attributes:
      requested: the name of the signal, or empty.

    Example:
      >>> step = 0
      >>> with StopRequest() as stop:
      ...     while not stop.due() and step < 3:
      ...         step += 1
      >>> step, stop.requested
      (3, '')
    """

    def __init__(self, at_once: Callable[[], object] | None = None):
        """Starts without a request."""
        self.requested: str = ""
        self._alone, self._calls = jax.process_count() == 1, 0
        self._at_once = at_once
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

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

    def _watch(self, at_once: Callable[[], object]) -> None:
        """Calls ``at_once`` for the second signal.

        Python runs its handlers between two of its own instructions, so not while JAX
        compiles. It notes signals in a socket immediately.
        """
        ours, theirs = self._wakeup = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

        def count() -> None:
            received = b""
            while (noted := ours.recv(1)) != b"":
                received += noted
                if len(received) == 2:
                    at_once()
            ours.close()

        threading.Thread(target=count, name="signals", daemon=True).start()

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
        if self._at_once is not None and self._alone:
            self._watch(self._at_once)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous handlers."""
        self._restore_handlers()
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup[1].close()  # Ends the thread, which closes the other end.
