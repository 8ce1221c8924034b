"""The runs that spike, and what is said of all precursors in them."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from early_warning.settings import Setting
from early_warning.spikes.alarms import JUMPS, alarm_report
from early_warning.spikes.cases import (
    Case,
    abnormal_steps,
    cases_of,
    is_clean,
    quiet_steps,
    spiking_steps,
)
from early_warning.spikes.matched_auc import all_wins, matched
from early_warning.spikes.precursors import JUMP, LOSS, PRECURSORS
from early_warning.trace import Trace, stack
from early_warning.training import run

# Half of the seeds were looked at while this was written; they set the levels.
STEPS, SEEDS, SEEN = 300, 16, 8
# Share of the quiet steps of the calibration runs at which an alarm may go off.
ALARMS = 0.005
# Steps before a spike in which it may have begun, and one.
ONSET = 5

# By setting, [runs, steps].
Series = dict[str, np.ndarray]


def record_spikes(setting: Setting, rate: float) -> Trace:
    """All runs of one setting, [seeds, …]."""
    return stack([run(setting, rate, seed, STEPS)[0] for seed in range(SEEDS)])


def unseen(series: Series) -> Series:
    """Of the seeds that were not looked at."""
    return {group: rows[SEEN:] for group, rows in series.items()}


def levels_of(series: Series, quiet: Series) -> dict[str, float]:
    """What few of the quiet steps of the seeds that were looked at pass."""
    return {
        group: float(np.quantile(rows[:SEEN][quiet[group][:SEEN]], 1 - ALARMS))
        for group, rows in series.items()
    }


def series_of(of: Callable[[Trace], np.ndarray], traces: dict[str, Trace]) -> Series:
    """A precursor in all runs."""
    # After a divergence there is nothing to divide by.
    with np.errstate(all="ignore"):
        return {group: of(trace) for group, trace in traces.items()}


def precursor_report(
    series: Series,
    quiet: Series,
    cases: list[Case],
    clean: list[Case],
    loss: np.ndarray,
) -> dict[str, Any]:
    """What is said of one precursor; ``loss`` are the wins of the control."""
    new, levels = unseen(series), levels_of(series, quiet)
    early = all_wins(cases, new, ONSET)
    return {
        "whole": matched(cases, new, all_wins(cases, new, 1)),
        "before_onset": matched(cases, new, early),
        "clean": matched(clean, new, all_wins(clean, new, ONSET)),
        "minus_loss": matched(cases, new, early - loss),
        "alarm": alarm_report(cases, new, unseen(quiet), levels),
    }


def jump_reports(jumps: Series, quiet: Series, cases: list[Case]) -> dict[str, Any]:
    """Alarms at fixed limits on the jump of the update rms."""
    return {
        f"{factor:g}": alarm_report(
            cases, unseen(jumps), unseen(quiet), dict.fromkeys(jumps, factor)
        )
        for factor in JUMPS
    }


def spike_report(traces: dict[str, Trace]) -> dict[str, Any]:
    """Everything that is said of one β₂."""
    abnormal = {
        group: np.asarray(abnormal_steps(trace.loss)) for group, trace in traces.items()
    }
    spiking = {group: spiking_steps(rows) for group, rows in abnormal.items()}
    quiet = {
        group: np.array([quiet_steps(row) for row in rows])
        for group, rows in spiking.items()
    }
    cases = [
        case
        for group, rows in unseen(spiking).items()
        for case in cases_of(group, rows)
    ]
    clean = [case for case in cases if is_clean(case, unseen(abnormal)[case.group])]
    series = {name: series_of(of, traces) for name, of in PRECURSORS.items()}
    loss = all_wins(cases, unseen(series[LOSS]), ONSET)
    return {
        "runs": sum(len(rows) for rows in unseen(spiking).values()),
        "cases": [case._asdict() for case in cases],
        "clean": len(clean),
        "quiet_steps": int(sum(rows.sum() for rows in unseen(quiet).values())),
        "precursors": {
            name: precursor_report(each, quiet, cases, clean, loss)
            for name, each in series.items()
        },
        "jumps": jump_reports(series[JUMP], quiet, cases),
    }


def spikes_report(groups: dict[str, Any]) -> dict[str, Any]:
    """The second question, for these groups of settings."""
    reports = {}
    for b2, group in groups.items():
        sys.stderr.write(f"spikes, β₂ = {b2}\n")
        reports[b2] = spike_report(
            {name: record_spikes(*each) for name, each in group.items()}
        )
    return reports
