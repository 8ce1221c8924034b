"""The tables of the second study."""

from typing import Any

import numpy as np
from reporting import Report, markdown, share

# In the report, and as the head of a column.
COMPARISONS = {
    "whole": "AUC",
    "before_onset": "5–30",
    "clean": "clean",
    "minus_loss": "minus loss",
}


def interval(row: dict[str, float] | None) -> str:
    """An AUC and its interval."""
    if row is None:
        return "–"
    return f"{row['auc']:.2f} ({row['low']:.2f} … {row['high']:.2f})"


def alarm_cells(alarm: dict[str, Any]) -> list[str]:
    """Recall, controls, false alarms and lead."""
    controls, lead = alarm["controls"], alarm["lead"]
    return [
        share(alarm["recall"]),
        "–" if controls is None else f"{100 * controls:.0f} %",
        f"{alarm['false_per_1000']:.1f}",
        "–" if lead is None else f"{lead:g}",
    ]


def spikes_table(report: dict[str, Any]) -> str:
    """All precursors at one β₂."""
    rows = [
        [
            name,
            *(interval(row[each]) for each in COMPARISONS),
            *alarm_cells(row["alarm"]),
        ]
        for name, row in report["precursors"].items()
    ]
    head = ["precursor", *COMPARISONS.values(), "recall", "controls", "false", "lead"]
    return markdown(head, rows)


def jumps_table(report: dict[str, Any]) -> str:
    """Fixed limits on the jump of the update rms."""
    health = np.sum([x["jumps"] for x in report["rates"]["settings"].values()], axis=0)
    rows = [
        [
            f"{b2}, more than × {factor}",
            *alarm_cells(alarm),
            f"{1000 * count / health[-1]:.1f}",
        ]
        for b2, each in report["spikes"].items()
        for (factor, alarm), count in zip(each["jumps"].items(), health, strict=False)
    ]
    return markdown(
        ["β₂, update rms", "recall", "controls", "false", "lead", "health"], rows
    )


def tables(report: Report) -> dict[str, str]:
    """All of them, by their titles."""
    found = {}
    for b2, each in report["spikes"].items():
        spiking = len({(case["group"], case["run"]) for case in each["cases"]})
        title = (
            f"β₂ = {b2}: {len(each['cases'])} spikes in {spiking} of {each['runs']} "
        )
        found[title + f"runs, {each['clean']} clean"] = spikes_table(each)
    return found | {"Jumps in healthy runs": jumps_table(report)}
