"""Both studies in one report, and its tables."""

from typing import Any

from reporting import Report

from early_warning.learning_rate import study as learning_rate
from early_warning.learning_rate import tables as learning_rate_tables
from early_warning.learning_rate.rule import LIMIT
from early_warning.learning_rate.statistics import WINDOW
from early_warning.settings import QUICK, QUICK_SPIKING, SETTINGS, SPIKING
from early_warning.spikes import study as spikes
from early_warning.spikes import tables as spike_tables


def rounded(x: Any) -> Any:
    """All numbers to five digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def header() -> dict[str, Any]:
    """With which numbers."""
    return {
        "rule": {"limit": LIMIT, "window": WINDOW},
        "steps": [learning_rate.STEPS, spikes.STEPS],
        "seeds": [learning_rate.SEEDS, spikes.SEEDS],
        "rates_tried": learning_rate.RATES,
    }


def make_report(quick: bool) -> Report:
    """Both questions."""
    found = {
        "rates": learning_rate.rates_report(QUICK if quick else SETTINGS),
        "spikes": spikes.spikes_report(QUICK_SPIKING if quick else SPIKING),
    }
    return rounded(header() | found)


def tables(report: Report) -> dict[str, str]:
    """All tables."""
    return learning_rate_tables.tables(report["rates"]) | spike_tables.tables(report)
