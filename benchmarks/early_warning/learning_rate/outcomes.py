"""Which runs end badly, and when their losses show it."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from early_warning.learning_rate.statistics import WINDOW
from early_warning.trace import Trace

# Nats above the best rate.
BAD, GOOD = 0.1, 0.03
VERDICTS = ("bad", "between", "good")
# Steps that a loss is the mean of, and for which it has to be above.
SMOOTH = LASTS = 10


def best_of(finals: np.ndarray) -> int:
    """The row of ``finals[rates, seeds]`` with the lowest mean; NaN is worst."""
    return int(np.argmin(np.nan_to_num(finals, nan=np.inf).mean(axis=1)))


def verdicts(finals: np.ndarray) -> np.ndarray:
    """Whether each of ``finals[rates, seeds]`` is "good", "between" or "bad"."""
    best = best_of(finals)
    worse = np.nan_to_num(finals - finals[best], nan=np.inf)
    found = np.where(worse > BAD, "bad", np.where(worse < GOOD, "good", "between"))
    found[: best + 1] = "good"
    return found


def crossing(loss: np.ndarray, reference: np.ndarray) -> int | None:
    """The first step from which on the loss is persistently above the reference."""
    worse = np.nan_to_num(loss - reference, nan=np.inf)
    above = sliding_window_view(worse, SMOOTH).mean(axis=1) > BAD
    lasting = np.flatnonzero(sliding_window_view(above, LASTS).all(axis=1))
    return int(lasting[0]) + SMOOTH - 1 if len(lasting) else None


def leads(trace: Trace, finals: np.ndarray, warmup: int) -> list[list[int | None]]:
    """Steps from the alarm to the crossing, of each run of ``[rates, seeds]``."""
    alarm, best = warmup + WINDOW - 1, best_of(finals)
    crossings = [
        [crossing(x, y) for x, y in zip(row, trace.loss[best], strict=True)]
        for row in trace.loss
    ]
    return [[None if x is None else x - alarm for x in row] for row in crossings]
