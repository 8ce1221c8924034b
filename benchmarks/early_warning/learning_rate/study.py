"""The runs of each setting at all rates, and what is said of them."""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from early_warning.learning_rate.alternatives import alternative_report
from early_warning.learning_rate.outcomes import best_of, leads, verdicts
from early_warning.learning_rate.rule import limit_report, others, rule_report
from early_warning.learning_rate.statistics import RHO, RHO_LATER, STATISTICS
from early_warning.settings import SETTINGS, Setting
from early_warning.spikes.alarms import jumps_in_health
from early_warning.trace import Trace, stack
from early_warning.training import run

STEPS, SEEDS = 240, 2
RATES = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 6e-2)


def record_rates(setting: Setting) -> tuple[Trace, np.ndarray]:
    """All runs of one setting, [rates, seeds, …], and their held-out losses."""
    rows = [[run(setting, r, seed, STEPS) for seed in range(SEEDS)] for r in RATES]
    finals = np.array([[loss for _, loss in row] for row in rows])
    return stack([stack([trace for trace, _ in row]) for row in rows]), finals


def rate_report(setting: Setting, trace: Trace, finals: np.ndarray) -> dict[str, Any]:
    """Everything that is said of the rates of one setting."""
    values = {
        name: each.of(trace, setting, np.array(RATES)[:, None]).tolist()
        for name, each in STATISTICS.items()
    }
    best = best_of(finals)
    return {
        "setting": setting._asdict(),
        "best_rate": RATES[best],
        "best_loss": finals[best].tolist(),
        "seed_noise": float(np.std(finals[best], ddof=1)),
        "held_out_loss": np.nan_to_num(finals, nan=99.0, posinf=99.0).tolist(),
        "verdict": verdicts(finals).tolist(),
        "lead": leads(trace, finals, setting.warmup),
        "jumps": jumps_in_health(trace.update_rms, verdicts(finals) == "good"),
        "statistics": values,
    }


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds what is said of all settings together."""
    return {
        "settings": settings,
        "others": rule_report(*(settings[name] for name in others(settings))),
        "limits": {name: limit_report(settings, name) for name in (RHO, RHO_LATER)},
        "alternatives": {
            name: alternative_report(settings, name) for name in STATISTICS
        },
    }


def rates_report(names: Iterable[str]) -> dict[str, Any]:
    """The first question, for these settings."""
    settings = {}
    for name in names:
        sys.stderr.write(f"{name}\n")
        report = rate_report(SETTINGS[name], *record_rates(SETTINGS[name]))
        settings[name] = report | {"rule": rule_report(report)}
    return compare(settings)
