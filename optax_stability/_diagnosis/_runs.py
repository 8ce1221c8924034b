"""Several trainings in one history.

A file that is appended to by every start, or by every stage of a job, has no single
normal level: each training is diagnosed for itself.
"""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._loss import loss_of
from optax_stability._diagnosis._normal import spread
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import finite, median


def starts(history: History) -> list[int]:
    """The first row of each training; of one training, 0 alone.

    A new one begins where the step falls back to the beginning, or the learning rate
    starts again after a decay, while the loss jumps. A schedule that restarts is no new
    training alone, and neither is a return to a checkpoint, or a step that is counted
    anew in each epoch.
    """
    found = {0}
    restarts = [_where_loss_jumps(history, row) for row in _rate_begins_again(history)]
    for rows in (_step_begins_again(history.steps), restarts):
        jumps = [row for row in rows if _loss_jumps(history, row)]
        if len(jumps) * 2 >= len(rows) or loss_of(history) is None:
            found |= set(rows)
    return sorted(found)


def _step_begins_again(steps: np.ndarray) -> list[int]:
    """Rows whose step is back within the first twentieth of those before."""
    highest = np.maximum.accumulate(steps)
    back = np.flatnonzero(np.diff(steps) < 0) + 1
    first = steps[:1]
    near = first + limits.BEGINNING_SHARE * (highest - first)
    return [int(row) for row in back if steps[row] <= near[row - 1]]


def _rate_begins_again(history: History) -> list[int]:
    """Rows at which the learning rate rises again after it had decayed."""
    rate = history.first_unprefixed("learning_rate")
    if rate is None:
        return []
    rows = np.flatnonzero(np.isfinite(rate.values))
    values, found, start = rate.values[rows], [], 0
    turns = np.flatnonzero(np.diff(values) > 0)
    for turn in turns:
        peak = values[start : turn + 1].max()
        low = values[turn] <= limits.DECAYED_SHARE * peak
        later = values[turn + 1 : turn + 1 + max(len(rows) // 4, limits.CENTRE)]
        high = (later >= limits.RATE_DECAYED * peak).any()
        if (
            peak > 0
            and low
            and high
            and np.argmax(values[start : turn + 1]) < turn - start
        ):
            found.append(int(rows[turn + 1]))
            start = turn + 1
    return found


def _where_loss_jumps(history: History, row: int) -> int:
    """The row, or the one before it: a warm-up may begin below the end of a decay."""
    return row - 1 if _loss_jumps(history, row - 1) else row


def _loss_jumps(history: History, row: int) -> bool:
    """Whether the loss after a row is far from the loss before it."""
    loss = loss_of(history)
    if loss is None:
        return False
    values = finite(loss.values)
    before = values[:row][~np.isnan(values[:row])][-limits.WINDOW :]
    after = values[row:][~np.isnan(values[row:])][: limits.MIN_MEASUREMENTS]
    if len(before) < limits.MIN_MEASUREMENTS or not len(after):
        return False
    noise = np.nan_to_num(spread(before)[-1])
    level = median(before[-limits.CENTRE :])
    jump = np.abs(after[0] - level)
    return bool(jump > max(limits.LOSS_SCALES * noise, limits.LOSS_FLOOR))


def several_runs(history: History, first_rows: list[int]) -> Finding | None:
    """The finding that there are several."""
    if len(first_rows) < 2:
        return None
    steps = ", ".join(f"{history.steps[row]:.0f}" for row in first_rows[:8])
    more = ", …" if len(first_rows) > 8 else ""
    evidence = (
        f"{len(first_rows)} trainings in one history, from steps {steps}{more} on: the "
        "step or the learning rate begins again there; each was diagnosed for itself"
    )
    return finding("several_runs", history, first_rows[1], "step", None, evidence)
