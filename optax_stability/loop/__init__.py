"""A training loop that can be killed, stopped, resumed and rewound.

May import: ``_core``, ``_recovery``, ``orbax``.
"""

from optax_stability.loop._errors import DivergedError, FailedError, NotSavedError
from optax_stability.loop._loop import TrainingLoop
from optax_stability.loop._run import Drawn, Run, Schedule, Window, Writer

__all__ = [
    "DivergedError",
    "Drawn",
    "FailedError",
    "NotSavedError",
    "Run",
    "Schedule",
    "TrainingLoop",
    "Window",
    "Writer",
]
