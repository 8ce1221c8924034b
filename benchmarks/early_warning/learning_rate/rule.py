"""How many runs the rule flags, and how early, with its own limit and with others."""

from typing import Any

import numpy as np

from early_warning.learning_rate.outcomes import VERDICTS
from early_warning.learning_rate.statistics import RHO, STATISTICS

# The rule as it was found, not to be changed here.
LIMIT = 0.0
LIMITS = (-0.3, -0.2, -0.1, LIMIT, 0.1, 0.2)


def scores_of(report: dict[str, Any], name: str, verdict: str) -> np.ndarray:
    """A statistic of the runs of one setting with one verdict; high is suspicious."""
    values = np.array(report["statistics"][name])[
        np.array(report["verdict"]) == verdict
    ]
    return -values if STATISTICS[name].low else values


def pooled(reports: dict[str, Any], name: str, verdict: str, settings) -> np.ndarray:
    """Likewise of several settings."""
    return np.concatenate([scores_of(reports[x], name, verdict) for x in settings])


def flagged_of(scores: np.ndarray, limit: float) -> list[int]:
    """How many are above the limit, and of how many."""
    return [int((scores > limit).sum()), len(scores)]


def rule_report(*reports: dict[str, Any]) -> dict[str, Any]:
    """What the unchanged rule makes of one setting, or of several together."""
    verdict, rho, lead = (
        np.concatenate([np.ravel(each) for each in parts])
        for parts in zip(
            *((x["verdict"], x["statistics"][RHO], x["lead"]) for x in reports),
            strict=True,
        )
    )
    caught = lead[(verdict == "bad") & (rho < LIMIT)].astype(float)
    seen = caught[np.isfinite(caught)]
    of = {each: rho[verdict == each] for each in VERDICTS}
    return {
        "flagged": {each: flagged_of(-x, -LIMIT) for each, x in of.items()},
        "rho": {
            each: [float(x.min()), float(x.max())] for each, x in of.items() if x.size
        },
        "lead": [float(seen.min()), float(np.median(seen))] if len(seen) else None,
        "in_time": [int((seen > 0).sum()), len(seen)],
        "flagged_but_never_seen": int(len(caught) - len(seen)),
    }


def others(reports: dict[str, Any]) -> tuple[str, ...]:
    """All settings but the first, on which the rule was found."""
    return tuple(reports)[1:] or tuple(reports)


def limit_report(reports: dict[str, Any], name: str) -> dict[str, Any]:
    """The rule with other limits, on settings it was not found on."""
    return {
        f"{limit:g}": {
            each: flagged_of(pooled(reports, name, each, others(reports)), -limit)
            for each in VERDICTS
        }
        for limit in LIMITS
    }
