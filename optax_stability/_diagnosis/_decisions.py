"""Clipping and skipping that happen too often."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History, Series


def _busiest_window(flags: np.ndarray, window: int) -> tuple[int, int]:
    """(start, count) of the window with the most flags; the first one on a tie."""
    sums = np.concatenate([[0], np.cumsum(flags)])
    counts = sums[window:] - sums[:-window]
    start = int(np.argmax(counts))
    return start, int(counts[start])


def clipping_too_often(history: History) -> Finding | None:
    """Clipping at nearly every step after the early descent."""
    start, window = history.settled_row(), limits.CLIPPED_WINDOW
    for clipped in _clipped(history):
        flags = clipped.values[start:] > 0
        if len(flags) < window:
            continue
        counts = np.convolve(flags, np.ones(window), "valid")
        often = np.flatnonzero(counts > limits.CLIPPED_SHARE * window)
        if not len(often):
            continue
        row = start + int(often[0]) + int(flags[often[0] :].argmax())
        evidence = (
            f"{flags[often[0] :].mean():.0%} of the steps were clipped, from step "
            f"{history.steps[row]} on, limit {limits.CLIPPED_SHARE:.0%} of {window} "
            f"steps{_norm_over_limit(history, row)}"
        )
        return finding("clipping_too_often", history, row, clipped.key, None, evidence)
    return None


def _clipped(history: History) -> list[Series]:
    """Whether each step was clipped, for every clip."""
    found = []
    for norm in history.find_all("clip/norm"):
        key = norm.key.replace("clip/norm", "clip/limit")
        if key in history.columns:
            found.append(Series(norm.key, norm.values > history.columns[key]))
    if found:
        return found
    for share in history.find_all("clip/fraction"):
        # ``clip/fraction`` is a running share: a clipped step raises the count by one.
        count = np.round(share.values * (history.steps + 1))
        found.append(Series(share.key, np.diff(count, prepend=count[:1]) > 0))
    return found


def _norm_over_limit(history: History, row: int) -> str:
    norm, limit = history.first("clip/norm"), history.first("clip/limit")
    if norm is None or limit is None:
        return ""
    ratio = np.nanmedian(norm.values[row:] / limit.values[row:])
    return f"; the norm is {ratio:.3g} times the clip limit (median)"


def frequent_skips(history: History) -> Finding | None:
    """Skipping more often than normal steps refill the token bucket of skips."""
    window = min(history.length, limits.SKIPPED_WINDOW)
    for skipped in _skipped(history):
        start, count = _busiest_window(skipped.values, window)
        if count < limits.SKIPPED_MIN or count <= limits.SKIPPED_SHARE * window:
            continue
        row = start + int(skipped.values[start:].argmax())
        evidence = (
            f"{count} of {window} steps were skipped, from step {history.steps[row]} "
            f"on, limit 1 in {1 / limits.SKIPPED_SHARE:.0f}; "
            f"{skipped.values.sum()} in total"
        )
        return finding("frequent_skips", history, row, skipped.key, None, evidence)
    return None


def _skipped(history: History) -> list[Series]:
    """Whether each step was skipped, for every guard."""
    flags = [
        Series(each.key, each.values == 1) for each in history.find_all("skip/skipped")
    ]
    if flags:
        return flags
    return [
        Series(each.key, np.diff(each.values, prepend=each.values[:1]) > 0)
        for each in history.find_all("skip/total")
    ]
