"""Problems that the loss itself shows: spikes and divergence."""

from collections.abc import Iterator

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._guarded_loss import stands_for_the_loss
from optax_stability._diagnosis._location import first_affected, gradient_norm
from optax_stability._diagnosis._normal import (
    Base,
    Normal,
    base,
    caution,
    levels,
    spread,
)
from optax_stability._diagnosis._series import History, Series
from optax_stability._diagnosis._windows import stretches


def loss_of(history: History) -> Series | None:
    """The training loss; not a number that never changes, given in its place."""
    loss = history.first_unprefixed("loss") or history.first("skip/value")
    return None if loss and stands_for_the_loss(history, loss) else loss


def loss_floor(level: np.ndarray) -> np.ndarray:
    """The least rise that counts: in nats, or in another unit, by the level."""
    level = np.abs(level)
    share = np.where(level > limits.HIGHEST_LOSS, limits.UNIT_SHARE, limits.LOSS_SHARE)
    return np.maximum(limits.LOSS_FLOOR, share * level)


def loss_spike(history: History) -> Finding | None:
    """A loss far above its recent level."""
    loss = loss_of(history)
    if loss is None:
        return None
    past = history.normal(loss.key)
    limit = past.bound(limits.LOSS_SCALES, loss_floor(past.level))
    above = past.excess > limit
    events = stretches(above, limits.EVENT_GAP)
    if not events:
        return None
    row = events[0][0]
    evidence = (
        f"loss {loss.values[row]:.3g} at step {history.steps[row]:.0f}, "
        f"{past.level[row]:.3g} before (median of {limits.CENTRE}): "
        f"{past.excess[row]:+.2f}, limit {limit[row]:+.2f}; "
        f"{_summary(history, past, above, len(events))}"
    )
    layer = first_affected(history, row)
    return finding("loss_spike", history, row, loss.key, layer, evidence)


def _summary(history: History, past: Normal, above: np.ndarray, events: int) -> str:
    """The number of steps and events, the worst step, and the number of skips."""
    worst = int(np.argmax(np.where(above, past.excess, -np.inf)))
    text = f"steps above the limit: {np.sum(above)}, events: {events}, worst "
    text += f"{past.excess[worst]:+.2f} at step {history.steps[worst]:.0f}"
    skipped = history.first("skip/skipped")
    if skipped is None:
        return text
    share = np.sum(skipped.values[above] == 1)
    return f"{text}; {share} of these steps skipped"


def divergence(history: History) -> Finding | None:
    """A loss that rose above its lowest level so far, and stayed there or ended in NaN.

    Medians of a few values are compared, so that noise does not count as a rise.
    """
    loss = loss_of(history)
    if loss is None:
        return None
    rows = np.flatnonzero(np.isfinite(loss.values))
    if len(rows) < limits.MIN_MEASUREMENTS + 1:
        return None
    values, died = loss.values[rows], _measurements_stopped(rows, history.length)
    past = base(values, first_is_known=_norm_confirms_first(history, rows))
    limit = _rise_limit(values, past)
    single = values > past.level + limit
    level = single if died else levels(values) > past.level + limit
    found = [
        (start, stop)
        for start, stop in _lasting(level, single, died)
        if not _is_noise(values, past, start, stop)
    ]
    if not found:
        return None
    start, stop = found[0]
    row = int(rows[start])
    evidence = (
        f"lowest loss {past.level[start]:.3g} (median of {limits.CENTRE}) before step "
        f"{history.steps[row]:.0f}, highest {values[start:stop].max():.3g} after; "
        f"{_end(history, rows, values - past.level[start], stop, died)}, limit "
        f"{limit[start]:+.2f}; above the limit at {single[start:stop].sum()} of "
        f"{stop - start} measurements"
    )
    layer = first_affected(history, row)
    return finding("divergence", history, row, loss.key, layer, evidence)


def _norm_confirms_first(history: History, rows: np.ndarray) -> bool:
    """Whether the gradient exploded right after the first loss, which was normal then.

    A single first value without that may be anything.
    """
    norm = gradient_norm(history)
    if norm is None:
        return False
    first, *later = norm.values[rows[: limits.MIN_MEASUREMENTS + 1]]
    later = [each for each in later if each > 0]
    return bool(first > 0 and later and max(later) >= limits.NORM_FACTOR * first)


def _measurements_stopped(rows: np.ndarray, length: int) -> bool:
    """Whether the finite values end before the history does."""
    return length - rows[-1] > np.diff(rows).max()


def _rise_limit(values: np.ndarray, past: Base) -> np.ndarray:
    """The rise above the lowest level that exceeds the noise at that level.

    A small loss is in another unit than nats: then it has to rise to a multiple.
    """
    level = np.abs(past.level)
    fall = np.maximum(np.maximum.accumulate(values) - past.level, 0.0)
    small = np.maximum(limits.RISE_FACTOR * level, limits.RISE_OF_FALL * fall)
    floor = np.where(small < limits.LOSS_FLOOR, small, loss_floor(level))
    # A level that was known from a few values: half of it more, at least.
    careful = caution(past.known)
    floor = np.maximum(floor, limits.EARLY_SHARE * careful * level)
    noise = np.nan_to_num(past.noise)
    return np.maximum(limits.LOSS_SCALES * noise, floor)


def _lasting(
    level: np.ndarray, single: np.ndarray, died: bool
) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rises that last; of single values, not of medians."""
    count = len(level)
    at_end = np.clip(
        count // limits.DIVERGED_SHARE,
        limits.MIN_MEASUREMENTS,
        limits.DIVERGED_MEASUREMENTS,
    )
    for start, stop in stretches(level, limits.CENTRE):
        # The median lags by half its window; the single values do not.
        near = max(start + 1 - limits.CENTRE, 0)
        first = near + int(single[near : start + 1].argmax())
        first = first if single[first] else start
        ends = stop == count
        least = limits.MIN_MEASUREMENTS - 1 if died and ends else at_end
        if stop - first >= (least if ends else limits.DIVERGED_MEASUREMENTS):
            yield first, stop


def _is_noise(values: np.ndarray, past: Base, start: int, stop: int) -> bool:
    """Whether a rise above a level of a few values is within the noise before the rise.

    The noise at the time of such a level was not known yet.
    """
    noise = np.nan_to_num(spread(values)[start])
    highest = levels(values)[start:stop].max()
    few = past.known[start] < limits.CENTRE
    return bool(few and highest <= past.level[start] + limits.LOSS_SCALES * noise)


def _end(
    history: History, rows: np.ndarray, rise: np.ndarray, stop: int, died: bool
) -> str:
    """How the rise ended, if it did."""
    if stop < len(rows):
        return (
            f"back within the limit from step {history.steps[rows[stop]]:.0f} on, "
            f"after {stop} measurements"
        )
    end = "in the last finite step" if died else "at the end"
    return f"{rise[-1]:+.3g} relative to the lowest {end}"


def loss_confirms(history: History, loss: Series) -> np.ndarray:
    """bool[T]: the loss is high enough to confirm a jump of the gradient."""
    past = history.normal(loss.key)
    above = past.above(limits.CONFIRM_SCALES, limits.CONFIRM_FLOOR)
    return above | np.isposinf(loss.values)
