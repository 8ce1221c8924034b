"""Prepares a history for drawing: thins and smooths curves, finds non-finite values.

*Problem*: 100,000 points on a line of 1,000 pixels are slow, and hide single events.
Here each pixel keeps its extremes.

*Cost*: passes over the columns that are drawn, on the host. NumPy only.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import median

# Pixels of a line; each shows two points.
PIXELS = 800
# The running median covers a fortieth of the run.
SMOOTH = 40
# Larger values overflow in the arithmetic of axes; no finite float32 is larger.
_LARGEST = 1e100
# NaN is a non-finite value, not a missing one, after this many measured rows.
_MEASURED = 3


class Branches(NamedTuple):
    """The branches, probes and rollbacks of ``branch_on_spike``.

    Attributes:
      steps: float64[T] – steps of all rows, including probes.
      is_open: bool[T] – whether a branch was open after the step.
      failed_probes: bool[T] – whether the step was a probe without a rollback.
      rolled_back: bool[T] – whether the branch was rolled back.
    """

    steps: np.ndarray
    is_open: np.ndarray
    failed_probes: np.ndarray
    rolled_back: np.ndarray


class Run(NamedTuple):
    """A history, ready to be drawn.

    Attributes:
      train: the training rows, without probes, which were measured on the snapshot.
      held_out_steps: float64[n] – steps with an evaluation on held-out data.
      held_out: float64[n] – the loss on held-out data at these steps.
      branches: the branches; None without ``branch_on_spike``.
    """

    train: History
    held_out_steps: np.ndarray
    held_out: np.ndarray
    branches: Branches | None


def read(history: dict[str, np.ndarray]) -> Run:
    """Checks a history, and separates training rows from rows of an evaluation."""
    whole = History(history)
    held_out = whole.columns.get("eval/loss", np.full(whole.length, np.nan))
    only_held_out = ~np.isnan(held_out)
    seen = np.flatnonzero(only_held_out)
    for each in (loss_of(whole), norm_of(whole)):
        only_held_out &= True if each is None else np.isnan(each)
    rows = ~only_held_out
    train = whole
    if only_held_out.any() and rows.any():
        train = History({key: each[rows] for key, each in whole.columns.items()})
    steps = whole.columns["step"][seen]
    branches = _branches(train)
    return Run(train.without_probes(), steps, finite(held_out[seen]), branches)


def _branches(history: History) -> Branches | None:
    mode, back = (column(history, f"branch/{name}") for name in ("mode", "rollbacks"))
    if mode is None or back is None:
        return None
    probed = column(history, "branch/probed")
    probed = np.zeros(len(mode)) if probed is None else probed
    rolled_back = np.diff(back, prepend=back[:1]) > 0
    failed_probes = (probed == 1) & ~rolled_back
    return Branches(history.columns["step"], mode > 0, failed_probes, rolled_back)


def loss_of(history: History) -> np.ndarray | None:
    """The training loss; ``skip/value`` is 0 if no loss was passed."""
    found = history.first_unprefixed("loss")
    if found is None:
        found = history.first("skip/value")
        if found is not None and not found.values.any():
            return None
    return None if found is None else found.values


def norm_of(history: History) -> np.ndarray | None:
    """The gradient norm, by the first of its names that was measured."""
    return column(history, "grad/norm", "skip/norm", "clip/norm")


def column(history: History, *names: str) -> np.ndarray | None:
    """The first of these metrics that was ever measured."""
    found = history.first(*names)
    return None if found is None else found.values


def finite(values: np.ndarray) -> np.ndarray:
    """The values, with NaN for those that cannot be drawn."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < _LARGEST, values, np.nan)


def is_nonfinite(values: np.ndarray) -> np.ndarray:
    """bool[T]: Inf, or NaN in a metric that was measured in every row until then."""
    missing = np.isnan(values)
    known = np.cumsum(np.concatenate([np.zeros(_MEASURED), ~missing]))
    before = np.concatenate([[0], known[_MEASURED:-1] - known[: -_MEASURED - 1]])
    starts = missing & ~np.concatenate([[False], missing[:-1]])
    row = np.maximum.accumulate(np.where(starts, np.arange(len(values)), 0))
    became_nan = missing & (before[: len(values)][row] == _MEASURED)
    return became_nan | (np.abs(values) >= _LARGEST)


def extreme_rows(values: np.ndarray) -> np.ndarray:
    """int[n]: the rows with the lowest and highest value of each pixel."""
    if len(values) <= 2 * PIXELS:
        return np.arange(len(values))
    parts = np.array_split(values, PIXELS)
    start, rows = 0, []
    for part in parts:
        low = int(np.argmin(np.where(np.isnan(part), np.inf, part)))
        high = int(np.argmax(np.where(np.isnan(part), -np.inf, part)))
        rows += [start + low, start + high]
        start += len(part)
    return np.unique(rows)


def isolated_rows(values: np.ndarray) -> np.ndarray:
    """int[n]: rows of values without a neighbour, which a line does not show."""
    gaps = np.isnan(np.pad(values, 1, constant_values=np.nan))
    return np.flatnonzero(~gaps[1:-1] & gaps[:-2] & gaps[2:])


def marker_rows(flags: np.ndarray, height: np.ndarray) -> np.ndarray:
    """int[n]: flagged rows, thinned to the highest one of each pixel."""
    rows = np.flatnonzero(flags)
    if len(rows) <= PIXELS:
        return rows
    pixel = rows * PIXELS // len(flags)
    order = np.lexsort([np.nan_to_num(height[rows]), pixel])
    last = np.append(pixel[order][1:] != pixel[order][:-1], True)
    return np.sort(rows[order[last]])


def running_median(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, level): centred running median, robust against single spikes."""
    half = len(values) // (2 * SMOOTH)
    rows = np.arange(0, len(values), 1 + len(values) // PIXELS)
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return rows, median(windows[rows], axis=1)


def last_level(values: np.ndarray) -> float:
    """The running median at the end; NaN without a value."""
    known = finite(values)
    known = known[~np.isnan(known)]
    if not len(known):
        return np.nan
    return float(running_median(known)[1][-1])


def lowest_level(values: np.ndarray) -> float:
    """The lowest running median; NaN without a value."""
    known = finite(values)
    known = known[~np.isnan(known)]
    return float(running_median(known)[1].min()) if len(known) else np.nan


def inner_range(values: np.ndarray) -> tuple[float, float] | None:
    """(low, high) of the finite values without extreme outliers; None if empty."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, q1, q99, high = np.quantile(values, [0, 0.01, 0.99, 1])
    reach = 3 * (q99 - q1)
    return float(max(low, q1 - reach)), float(min(high, q99 + reach))
