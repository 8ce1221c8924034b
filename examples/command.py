"""Runs a command of the examples: what the user can correct is one line."""

import io
import itertools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from inputs import InputError

from optax_stability.loop import FailedError


def end_at_once() -> None:
    """Ends the process, as a second Ctrl-C asks for; what was saved is whole."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")  # The cursor was hidden.
    os._exit(130)


def _check_arguments(arguments: list[str]) -> None:
    """Refuses empty arguments, such as that of an unset variable in a script."""
    for before, argument in itertools.pairwise(arguments):
        flag = argument[:-1] if argument.endswith("=") else before
        if not argument.removeprefix(f"{flag}=").strip() and flag.startswith("--"):
            raise InputError(f"{flag}: is empty; give a value, or leave {flag} out")


def _print_unless_it_was_said(error: Any) -> None:
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def run_command(work: Callable[[], object]) -> None:
    """Runs a command; an error that the user can correct is printed as one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for what it cannot show.
    # Of a save that fails, Orbax logs tracebacks, and TensorStore prints one for every
    # array; the trainer says it in a line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _print_unless_it_was_said
    try:
        _check_arguments(sys.argv)
        work()
    except (InputError, FailedError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
