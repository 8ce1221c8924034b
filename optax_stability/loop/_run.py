"""What a training loop drives, when it does what, and where it writes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Row = dict[str, Any]


class Drawn(NamedTuple):
    """What a step is trained on.

    Attributes:
      step: the step, from 1.
      batch: number of the draw, from 1; larger than ``step`` after a rewind.
      position: number of the batch in the data, from 0; some are drawn twice.
      again: whether it was drawn before.
    """

    step: int
    batch: int
    position: int
    again: bool


class Window(NamedTuple):
    """One example of a batch.

    Attributes:
      loss: its loss under the current parameters.
      text: what a person should see of it.
      origin: where in which file it is.
    """

    loss: float
    text: str
    origin: str


class Run(Protocol):
    """A model and its data, as the loop sees them.

    Attributes:
      state: a pytree of arrays; training depends on it, and on what is drawn, only.
      tokens_per_step: tokens in one batch, or examples where there are no tokens.
    """

    state: Any
    tokens_per_step: int

    def advance(self, drawn: Drawn) -> Mapping[str, jax.Array]:
        """Trains on a batch, and replaces ``state``; returns the metrics.

        Among them are ``loss``, and those of the guard, ``skip/skipped`` and
        ``skip/value_limit``, if there is one. They may still be computed. Those with
        axes are histograms.
        """
        ...

    def examine(self, drawn: Drawn) -> list[Window]:
        """The examples of a batch, with their losses under the current parameters."""
        ...

    def evaluate(self) -> Row:
        """Evaluates the model; the names begin with ``eval/``."""
        ...

    def speed(self, seconds: float) -> Row:
        """What to log of the speed, from the average duration of a step."""
        ...


class Writer(Protocol):
    """Where rows of numbers go, such as :class:`optax_stability.RunLog`."""

    def write(self, step: int, row: Row) -> None:
        """Writes the measurements of a step; those with axes are histograms."""
        ...


class Schedule(NamedTuple):
    """When the loop does what, in steps.

    Attributes:
      steps: last step of the run.
      eval_every: steps from one evaluation to the next.
      checkpoint_every: steps from one checkpoint to the next.
      histogram_every: steps from one set of histograms to the next; 0 for none.
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    histogram_every: int = 0
