"""Numbers that others report, so that runs can be compared with theirs."""

import numpy as np

WINDOW, DEVIATIONS = 128, 6.0


def spike_score(values: np.ndarray) -> float:
    """Share of values above the mean plus six σ of the 128 values before each.

    The rule of OLMo and its kin, who skip such steps or count them. NaN and Inf are
    left out; 0 if there are fewer values than a window.
    """
    values = values[np.isfinite(values)]
    if len(values) <= WINDOW:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(values[:-1], WINDOW)
    limit = windows.mean(axis=1) + DEVIATIONS * windows.std(axis=1)
    return float(np.sum(values[WINDOW:] > limit) / len(values))
