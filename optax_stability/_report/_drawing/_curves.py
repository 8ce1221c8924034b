"""What a picture shows of a history: curves that are thinned, smoothed, or broken.

*Problem*: 100,000 points on a line of 1,000 pixels are slow, and hide the one that
matters. Here each pixel keeps its extremes.

*Cost*: passes over the columns that are drawn, on the host. NumPy only.
"""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._trend import median

# Twice as many points as a line of that many pixels can show.
PIXELS = 800
# A trend is the median over a fortieth of the run.
_SMOOTH = 40
# Beyond it, arithmetic on axes overflows; nothing in float32 is.
_LARGEST = 1e100
# NaN is a broken value, not a missing one, after so many values in a row.
_MEASURED = 3


class Branches(NamedTuple):
    """What ``branch_on_spike`` did.

    Attributes:
      steps: float64[T] – of every row, those of probes included.
      is_open: bool[T] – whether a branch was, after the step.
      in_vain: bool[T] – whether the kept parameters were asked, and not gone back to.
      taken_back: bool[T] – whether they were gone back to.
    """

    steps: np.ndarray
    is_open: np.ndarray
    in_vain: np.ndarray
    taken_back: np.ndarray


class Run(NamedTuple):
    """A history, ready to be drawn.

    Attributes:
      train: the rows of training, but for probes, whose loss is not that of the run.
      held_out_steps: float64[n] – steps at which held-out data were looked at.
      held_out: float64[n] – the loss on them.
      branches: None if there was no ``branch_on_spike``.
    """

    train: History
    held_out_steps: np.ndarray
    held_out: np.ndarray
    branches: Branches | None


def read(history: dict[str, np.ndarray]) -> Run:
    """Checks a history, and takes rows apart that only an evaluation wrote."""
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
    taken_back = np.diff(back, prepend=back[:1]) > 0
    in_vain = (probed == 1) & ~taken_back
    return Branches(history.columns["step"], mode > 0, in_vain, taken_back)


def loss_of(history: History) -> np.ndarray | None:
    """The loss of training; ``skip/value`` is 0 where none was given."""
    found = history.exactly("loss")
    if found is None:
        found = history.first("skip/value")
        if found is not None and not found.values.any():
            return None
    return None if found is None else found.values


def norm_of(history: History) -> np.ndarray | None:
    """The norm of the gradient, by the first of its names."""
    return column(history, "grad/norm", "skip/norm", "clip/norm")


def column(history: History, *names: str) -> np.ndarray | None:
    """The first of these metrics that was ever measured."""
    found = history.first(*names)
    return None if found is None else found.values


def finite(values: np.ndarray) -> np.ndarray:
    """NaN for all that has no place on an axis."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < _LARGEST, values, np.nan)


def broken(values: np.ndarray) -> np.ndarray:
    """bool[T]: Inf, or NaN in what was measured at every step until then."""
    missing = np.isnan(values)
    known = np.cumsum(np.concatenate([np.zeros(_MEASURED), ~missing]))
    before = np.concatenate([[0], known[_MEASURED:-1] - known[: -_MEASURED - 1]])
    starts = missing & ~np.concatenate([[False], missing[:-1]])
    row = np.maximum.accumulate(np.where(starts, np.arange(len(values)), 0))
    lost = missing & (before[: len(values)][row] == _MEASURED)
    return lost | (np.abs(values) >= _LARGEST)


def extremes(values: np.ndarray) -> np.ndarray:
    """int[n]: rows that draw the same line, the lowest and highest of each pixel."""
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


def isolated(values: np.ndarray) -> np.ndarray:
    """int[n]: rows of values without a neighbour, through which no line goes."""
    gaps = np.isnan(np.pad(values, 1, constant_values=np.nan))
    return np.flatnonzero(~gaps[1:-1] & gaps[:-2] & gaps[2:])


def marked(flags: np.ndarray, height: np.ndarray) -> np.ndarray:
    """int[n]: flagged rows, the highest of each pixel, so that none is lost to view."""
    rows = np.flatnonzero(flags)
    if len(rows) <= PIXELS:
        return rows
    pixel = rows * PIXELS // len(flags)
    order = np.lexsort([np.nan_to_num(height[rows]), pixel])
    last = np.append(pixel[order][1:] != pixel[order][:-1], True)
    return np.sort(rows[order[last]])


def trend(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, level): a median of the neighbours, which one spike does not move."""
    half = len(values) // (2 * _SMOOTH)
    rows = np.arange(0, len(values), 1 + len(values) // PIXELS)
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return rows, median(windows[rows], axis=1)


def inner_range(values: np.ndarray) -> tuple[float, float] | None:
    """(low, high) of what is finite, without outliers that would flatten the rest."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, q1, q99, high = np.quantile(values, [0, 0.01, 0.99, 1])
    reach = 3 * (q99 - q1)
    return float(max(low, q1 - reach)), float(min(high, q99 + reach))
