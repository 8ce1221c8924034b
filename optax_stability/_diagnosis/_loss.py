"""Problems that the loss itself shows: spikes and divergence."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._location import first_affected
from optax_stability._diagnosis._series import History, Series
from optax_stability._diagnosis._trend import Trend, median, smooth, stretches, trend


def loss_of(history: History) -> Series | None:
    """The training loss."""
    return history.first_unprefixed("loss") or history.first("skip/value")


def loss_trend(loss: Series) -> Trend:
    """The trend of the loss, with the limit of a spike."""
    return trend(loss.values, limits.LOSS_SCALES, limits.LOSS_FLOOR)


def loss_spike(history: History) -> Finding | None:
    """A loss far above its trend."""
    loss = loss_of(history)
    if loss is None:
        return None
    past = loss_trend(loss)
    events = stretches(past.above, limits.EVENT_GAP)
    if not events:
        return None
    row = events[0][0]
    evidence = (
        f"loss {loss.values[row]:.3g} at step {history.steps[row]}, "
        f"{past.centre[row]:.3g} before (median of {limits.CENTRE}): "
        f"{past.excess[row]:+.2f}, limit {past.bound[row]:+.2f}; "
        f"{_summary(history, past, events)}"
    )
    layer = first_affected(history, row)
    return finding("loss_spike", history, row, loss.key, layer, evidence)


def _summary(history: History, past: Trend, events: list[tuple[int, int]]) -> str:
    """The number of steps and events, the worst step, and the number of skips."""
    worst = int(np.argmax(np.where(past.above, past.excess, -np.inf)))
    text = f"steps above the limit: {np.sum(past.above)}, events: {len(events)}, worst "
    text += f"{past.excess[worst]:+.2f} at step {history.steps[worst]}"
    skipped = history.first("skip/skipped")
    if skipped is None:
        return text
    share = np.sum(skipped.values[past.above] == 1)
    return f"{text}; {share} of these steps skipped"


def divergence(history: History) -> Finding | None:
    """A loss that rose above its minimum, and stays there or ends in NaN.

    Medians of a few values are compared, so that noise does not count as a rise.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    rows = np.flatnonzero(np.isfinite(loss.values))
    if len(rows) < limits.WARMUP_VALUES:
        return None
    values, died = loss.values[rows], _measurements_stopped(rows, history.length)
    level = smooth(values)
    level[: limits.MIN_MEASUREMENTS - 1] = np.inf
    best = int(np.argmin(level))
    limit = _rise_limit(values, level, best)

    # The median lags by half its window; the single values do not.
    above = (values if died else level) > level[best] + limit
    above[: best + 1] = False
    last_normal = int(np.flatnonzero(~above)[-1])
    near = max(last_normal + 1 - limits.CENTRE, best + 1)
    risen = near + np.flatnonzero(values[near:] > level[best] + limit)
    least = limits.MIN_MEASUREMENTS - 1 if died else limits.DIVERGED_MEASUREMENTS
    if len(values) - 1 - last_normal < least:
        return None
    row = int(rows[risen[0]])
    end = "in the last finite step" if died else "at the end"
    evidence = (
        f"lowest loss {level[best]:.3g} (median of {limits.CENTRE}) before step "
        f"{history.steps[row]}, highest {values[near:].max():.3g} after; "
        f"{values[-1] - level[best]:+.3g} relative to the lowest {end}, limit "
        f"{limit:+.2f}; above the limit at {len(risen)} of the last "
        f"{len(values) - risen[0]} steps"
    )
    layer = first_affected(history, row)
    return finding("divergence", history, row, loss.key, layer, evidence)


def _measurements_stopped(rows: np.ndarray, length: int) -> bool:
    """Whether the finite values end before the history does."""
    return length - rows[-1] > np.diff(rows).max()


def _rise_limit(values: np.ndarray, level: np.ndarray, best: int) -> float:
    """The rise that exceeds the noise before the best level."""
    until = max(best + 1, limits.CENTRE)
    around = slice(max(until - limits.WINDOW, limits.MIN_MEASUREMENTS - 1), until)
    noise = float(median(np.abs(values[around] - level[around])))
    return max(limits.LOSS_SCALES * limits.SIGMA_PER_MAD * noise, limits.LOSS_FLOOR)


def loss_confirms(loss: Series) -> np.ndarray:
    """bool[T]: the loss is high enough to confirm a jump of the gradient."""
    past = trend(loss.values, limits.CONFIRM_SCALES, limits.CONFIRM_FLOOR)
    return past.above | np.isposinf(loss.values)
