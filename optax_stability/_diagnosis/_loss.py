"""What the loss itself shows: spikes, and a rise for good."""

import numpy as np

from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import first_affected
from optax_stability._diagnosis._series import History, Series
from optax_stability._diagnosis._trend import Trend, median, smooth, stretches, trend


def loss_of(history: History) -> Series | None:
    """The training loss."""
    return history.exactly("loss") or history.first("skip/value")


def loss_trend(loss: Series) -> Trend:
    """Where the loss is far above its recent past."""
    return trend(loss.values, limits.LOSS_SCALES, limits.LOSS_FLOOR)


def loss_spike(history: History) -> Finding | None:
    """A loss far above its trend."""
    loss = loss_of(history)
    if loss is None:
        return None
    past = loss_trend(loss)
    events = stretches(past.above, limits.APART)
    if not events:
        return None
    row = events[0][0]
    evidence = (
        f"loss {loss.values[row]:.3g} at step {history.steps[row]}, "
        f"{past.centre[row]:.3g} before (median of {limits.CENTRE}): "
        f"{past.excess[row]:+.2f}, limit {past.bound[row]:+.2f}; "
        f"{_extent(history, past, events)}"
    )
    layer = first_affected(history, row)
    return finding("loss_spike", history, row, loss.key, layer, evidence)


def _extent(history: History, past: Trend, events: list[tuple[int, int]]) -> str:
    """How many steps and events there were, the worst, and what a guard did."""
    worst = int(np.argmax(np.where(past.above, past.excess, -np.inf)))
    text = f"steps above: {np.sum(past.above)}, events: {len(events)}, worst "
    text += f"{past.excess[worst]:+.2f} at step {history.steps[worst]}"
    skipped = history.first("skip/skipped")
    if skipped is None:
        return text
    share = np.sum(skipped.values[past.above] == 1)
    return f"{text}; {share} of them skipped"


def divergence(history: History) -> Finding | None:
    """A loss that rose above what it had reached, and stays there or ends in NaN.

    Compared are medians of a few values, so that noise is no rise.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    rows = np.flatnonzero(np.isfinite(loss.values))
    if len(rows) < limits.ARM:
        return None
    values, died = loss.values[rows], _died(rows, history.length)
    level = smooth(values)
    level[: limits.LASTS - 1] = np.inf
    best = int(np.argmin(level))
    limit = _rise(values, level, best)

    # The median is late by half its window; the values themselves are not.
    above = (values if died else level) > level[best] + limit
    above[: best + 1] = False
    last_normal = int(np.flatnonzero(~above)[-1])
    near = max(last_normal + 1 - limits.CENTRE, best + 1)
    risen = near + np.flatnonzero(values[near:] > level[best] + limit)
    least = limits.LASTS - 1 if died else limits.DIVERGED_FOR
    if len(values) - 1 - last_normal < least:
        return None
    row = int(rows[risen[0]])
    end = "in the last finite step" if died else "at the end"
    evidence = (
        f"lowest loss {level[best]:.3g} (median of {limits.CENTRE}) before step "
        f"{history.steps[row]}, highest {values[near:].max():.3g} after; "
        f"{values[-1] - level[best]:+.3g} {end}, limit {limit:+.2f}; above it at "
        f"{len(risen)} of the last {len(values) - risen[0]} steps"
    )
    layer = first_affected(history, row)
    return finding("divergence", history, row, loss.key, layer, evidence)


def _died(rows: np.ndarray, length: int) -> bool:
    """Whether measurements stopped before the history does."""
    return length - rows[-1] > np.diff(rows).max()


def _rise(values: np.ndarray, level: np.ndarray, best: int) -> float:
    """The rise that is more than the noise up to the best level."""
    until = max(best + 1, limits.CENTRE)
    around = slice(max(until - limits.WINDOW, limits.LASTS - 1), until)
    noise = float(median(np.abs(values[around] - level[around])))
    return max(limits.LOSS_SCALES * limits.SIGMA_PER_MAD * noise, limits.LOSS_FLOOR)


def confirms(loss: Series) -> np.ndarray:
    """bool[T]: the loss is high enough for a jump of the gradient to count."""
    past = trend(loss.values, limits.CONFIRM_SCALES, limits.CONFIRM_FLOOR)
    return past.above | np.isposinf(loss.values)
