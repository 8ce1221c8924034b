"""Other statistics: limits chosen on every other setting, and tested on the rest."""

from typing import Any

import numpy as np

from early_warning.learning_rate.rule import flagged_of, pooled
from early_warning.learning_rate.statistics import STATISTICS
from early_warning.settings import SETTINGS

CHOOSING = tuple(SETTINGS)[::2]


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """How often one of ``high`` is above one of ``low``; a tie is half."""
    pairs = high[:, None] - low
    return float(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def choose_limit(bad: np.ndarray, good: np.ndarray) -> float:
    """The limit above which are most bad scores and fewest good ones.

    Of equally good limits the middle one, half way between two scores.
    """
    scores = np.unique(np.concatenate([bad, good]))
    limits = (scores[1:] + scores[:-1]) / 2
    gains = np.array([(bad > x).mean() - (good > x).mean() for x in limits])
    best = limits[gains == gains.max()]
    return float(best[len(best) // 2])


def alternative_report(reports: dict[str, Any], name: str) -> dict[str, Any]:
    """One statistic: limit chosen on some settings, tested on the others."""
    chosen = [x for x in reports if x in CHOOSING] or list(reports)
    tested = [x for x in reports if x not in CHOOSING]
    parts = {
        place: {each: pooled(reports, name, each, x) for each in ("bad", "good")}
        for place, x in (("chosen", chosen), ("tested", tested), ("all", list(reports)))
    }
    limit = choose_limit(**parts["chosen"])
    return {
        "limit": -limit if STATISTICS[name].low else limit,
        "auc": auc(parts["all"]["bad"], parts["all"]["good"]),
    } | {
        place: {each: flagged_of(x, limit) for each, x in parts[place].items()}
        for place in ("chosen", "tested")
    }
