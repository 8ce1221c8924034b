"""Clipping and skipping: too often, at the wrong place, or always at the same data."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._normal import spread
from optax_stability._diagnosis._series import History, Series, log_of
from optax_stability._diagnosis._windows import stretches


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
    """Whether each step was clipped, and not by little, for every clip."""
    found = []
    for norm in history.find_all("clip/norm"):
        key = norm.key.replace("clip/norm", "clip/limit")
        if key in history.columns:
            limit = limits.CLIPPED_FACTOR * history.columns[key]
            found.append(Series(norm.key, norm.values > limit))
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


def skip_budget_spent(history: History) -> Finding | None:
    """Spikes that were taken because no skip was left."""
    for declined in history.find_all("skip/declined_total"):
        rows = np.flatnonzero(np.diff(declined.values, prepend=0.0) > 0)
        if history.steps[0] > 0:  # What was counted before is old.
            rows = rows[rows > 0]
        if not len(rows):
            continue
        if len(rows) < limits.SCALED_SHARE * history.length and _norms_alone(
            history, declined.key
        ):
            continue
        row = int(rows[0])
        skipped = history.columns.get(declined.key.replace("declined_", ""))
        before = "" if skipped is None else f"; {np.nanmax(skipped):.0f} were skipped"
        evidence = (
            f"{len(rows)} steps with a finite spike were taken because no skip was "
            f"left, the first at step {history.steps[row]:.0f}{before}"
        )
        return finding("skip_budget_spent", history, row, declined.key, None, evidence)
    return None


def _norms_alone(history: History, key: str) -> bool:
    """Whether the guard had no limit on the loss: it then scales what a clip would."""
    limit = history.columns.get(key.replace("declined_total", "value_limit"))
    return limit is not None and not np.isfinite(limit).any()


def clustered_skips(history: History) -> Finding | None:
    """Skips at the same position in the data, pass after pass.

    The position is the fraction of ``epoch`` if it was recorded; otherwise a period is
    looked for in the steps of the skips.
    """
    for skipped in _skipped(history):
        events = [start for start, _ in stretches(skipped.values, limits.CENTRE)]
        if len(events) < limits.CLUSTER_EVENTS:
            continue
        found = _by_epoch(history, events) or _by_period(history, events)
        if found:
            return finding(
                "clustered_skips", history, events[0], skipped.key, None, found
            )
    return None


def _by_epoch(history: History, events: list[int]) -> str | None:
    """Evidence that events are at one place of the epochs."""
    epoch = history.first_unprefixed("epoch", "data/epoch")
    if epoch is None:
        return None
    at = epoch.values[events]
    at = at[np.isfinite(at)]
    place, count = _densest(at % 1.0, limits.CLUSTER_WIDTH)
    passes = len(np.unique(np.floor(at)))
    enough = count >= max(limits.CLUSTER_EVENTS, limits.CLUSTER_SHARE * len(at))
    if passes < limits.MIN_MEASUREMENTS or not enough:
        return None
    return (
        f"{count} of {len(at)} rows of skips are within {limits.CLUSTER_WIDTH:.0%} of "
        f"an epoch after {place:.0%} of it, in {passes} epochs"
    )


def _by_period(history: History, events: list[int]) -> str | None:
    """Evidence that events come back after the same number of steps."""
    steps = history.steps[events]
    gaps = np.unique(np.round(np.diff(steps)))
    for period in gaps[gaps >= limits.CLUSTER_PERIOD]:
        # Few events may be near each other by chance.
        share = 5 if len(events) < 2 * limits.MIN_MEASUREMENTS else 2
        width = max(2.0 / period, limits.CLUSTER_WIDTH / share)
        place, count = _densest((steps / period) % 1.0, width)
        passes = (steps[-1] - steps[0]) / period
        enough = count >= max(limits.CLUSTER_EVENTS, limits.CLUSTER_SHARE * len(steps))
        if enough and passes >= limits.MIN_MEASUREMENTS:
            return (
                f"{count} of {len(steps)} rows of skips come back every {period:.0f} "
                f"steps, {place * period:.0f} steps after a multiple of it"
            )
    return None


def _densest(places: np.ndarray, width: float) -> tuple[float, int]:
    """Start and number of the places in the fullest arc of a circle of length 1."""
    ahead = (places[None, :] - places[:, None]) % 1.0
    counts = np.sum(ahead <= width, axis=1)
    at = int(np.argmax(counts)) if len(places) else 0
    return (float(places[at]), int(counts[at])) if len(places) else (0.0, 0)


def misplaced_clip(history: History) -> Finding | None:
    """A clip that sees nearly the same norm at every step, unlike the gradient."""
    clips = history.find_all("clip/norm")
    gradient = history.first("grad/norm", "skip/norm")
    if gradient is None:
        return None
    for clip in clips:
        both = [
            log_of(np.where(np.isfinite(each.values), each.values, np.nan))
            for each in (clip, gradient)
        ]
        rows = np.flatnonzero(~np.isnan(both).any(axis=0))
        rows = rows[rows >= history.settled_row()]
        if len(rows) < limits.SAME_NORM_ROWS:
            continue
        same, varying = (float(np.median(spread(each[rows])[8:])) for each in both)
        if same > limits.SAME_NORM or varying < limits.VARYING_NORM:
            continue
        evidence = (
            f"the norm before the clip scatters by {same:.2%} from step to step, that "
            f"of the gradient by {varying:.0%}: the clip sees a normalised update "
            f"(norm {clip.values[rows[-1]]:.3g}), not the gradient "
            f"({gradient.values[rows[-1]]:.3g})"
        )
        row = int(rows[0])
        return finding("misplaced_clip", history, row, clip.key, None, evidence)
    return None
