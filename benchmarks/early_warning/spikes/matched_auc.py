"""How often a precursor is higher before a spike than in the controls of the spike."""

import numpy as np

from early_warning.spikes.cases import BEFORE, Case

RESAMPLES = 2000


def peaks(series: np.ndarray, step: int, last: int = 1) -> np.ndarray:
    """The highest value of each run ``BEFORE`` to ``last`` steps before the step."""
    return series[:, step - BEFORE : step - last + 1].max(axis=1)


def wins_of(case: Case, series: np.ndarray, last: int) -> np.ndarray:
    """1 for each control that the spiking run is above, a half for a tie; else NaN."""
    highest, wins = peaks(series, case.step, last), np.full(len(series), np.nan)
    above = highest[case.run] - highest[case.controls]
    wins[case.controls] = (above > 0) + 0.5 * (above == 0)
    return wins


def matched_auc(wins: np.ndarray, weights: np.ndarray, runs: np.ndarray) -> float:
    """Mean over spikes of the mean over their controls, runs weighted.

    Args:
      wins: [spikes, all runs], NaN where a run is no control.
      weights: [all runs].
      runs: the run that each spike is in.
    """
    paired = np.isfinite(wins) * weights
    total = paired.sum(axis=1)
    weight = weights[runs] * (total > 0)
    means = np.nansum(wins * weights, axis=1) / np.where(total > 0, total, 1)
    return float((weight * means).sum() / weight.sum()) if weight.any() else np.nan


def all_wins(cases: list[Case], series: dict[str, np.ndarray], last: int) -> np.ndarray:
    """The wins of each case over the runs of all settings, [cases, all runs]."""
    rows = []
    for case in cases:
        parts = {group: np.full(len(x), np.nan) for group, x in series.items()}
        parts[case.group] = wins_of(case, series[case.group], last)
        rows.append(np.concatenate(list(parts.values())))
    return np.array(rows)


def matched(
    cases: list[Case], series: dict[str, np.ndarray], wins: np.ndarray
) -> dict[str, float] | None:
    """AUC against matched controls, with a bootstrap over runs within each setting.

    A run that is drawn twice counts twice, be it as a case or as a control. The
    difference of two AUCs is that of their wins.
    """
    if not cases:
        return None
    sizes = [len(rows) for rows in series.values()]
    starts = dict(zip(series, np.cumsum([0, *sizes]), strict=False))
    runs = np.array([starts[case.group] + case.run for case in cases])
    rng = np.random.default_rng(0)
    again = [
        matched_auc(wins, np.concatenate([draw(rng, size) for size in sizes]), runs)
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanpercentile(again, [2.5, 97.5])
    whole = matched_auc(wins, np.ones(sum(sizes)), runs)
    return {"auc": whole, "low": float(low), "high": float(high)}


def draw(rng: np.random.Generator, runs: int) -> np.ndarray:
    """How often each run is drawn, with replacement."""
    return rng.multinomial(runs, np.full(runs, 1 / runs))
