"""Alarms above a level: in front of spikes, in controls, and for nothing."""

from typing import Any

import numpy as np

from early_warning.spikes.cases import BEFORE, FIRST, Case
from early_warning.spikes.precursors import jump

# Update rms over its median of the last 32 steps.
JUMPS = (1.5, 2.0, 3.0)


def first_alarm(alarms: np.ndarray, step: int) -> int | None:
    """How many steps before the step the first of its ``BEFORE`` alarms went off."""
    found = np.flatnonzero(alarms[step - BEFORE : step])
    return BEFORE - int(found[0]) if len(found) else None


def alarm_report(
    cases: list[Case],
    series: dict[str, np.ndarray],
    quiet: dict[str, np.ndarray],
    levels: dict[str, float],
) -> dict[str, Any]:
    """Alarms above a level: how many in front of spikes, controls, and for nothing."""
    alarms = {group: rows > levels[group] for group, rows in series.items()}
    found = [first_alarm(alarms[x.group][x.run], x.step) for x in cases]
    controls = [
        np.mean(
            [first_alarm(alarms[x.group][i], x.step) is not None for i in x.controls]
        )
        for x in cases
    ]
    false = sum(int(rows[quiet[group]].sum()) for group, rows in alarms.items())
    steps = sum(int(rows.sum()) for rows in quiet.values())
    given = [lead for lead in found if lead is not None]
    return {
        "recall": [len(given), len(cases)],
        "controls": float(np.mean(controls)) if cases else None,
        "false_per_1000": 1000 * false / max(steps, 1),
        "lead": float(np.median(given)) if given else None,
    }


def jumps_in_health(update_rms: np.ndarray, good: np.ndarray) -> list[int]:
    """Steps at which the update rms jumps in good runs, by factor; last, all steps."""
    later = jump(update_rms[good])[:, FIRST:]
    return [int((later > factor).sum()) for factor in JUMPS] + [later.size]
