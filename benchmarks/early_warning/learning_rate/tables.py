"""The tables of the first study."""

from typing import Any

from reporting import markdown, share


def span(ends: list[float] | None) -> str:
    """From the least to the most."""
    return "–" if ends is None else f"{ends[0]:+.2f} … {ends[1]:+.2f}"


def rule_cells(rule: dict[str, Any]) -> list[str]:
    """What the rule makes of one setting, or of several."""
    lead = rule["lead"]
    return (
        [share(rule["flagged"][each]) for each in ("bad", "good", "between")]
        + [span(rule["rho"].get(each)) for each in ("bad", "good")]
        + ["–" if lead is None else f"{lead[0]:g}, {lead[1]:g}"]
        + [share(rule["in_time"])]
    )


def settings_table(rates: dict[str, Any]) -> str:
    """The unchanged rule, by setting."""
    head = ["setting", "best rate", "seed noise", "bad flagged", "good flagged"]
    head += ["between flagged", "ρ̂ bad", "ρ̂ good", "lead: least, median", "in time"]
    rows = [
        [
            name,
            f"{each['best_rate']:g}",
            f"{each['seed_noise']:.3f}",
            *rule_cells(each["rule"]),
        ]
        for name, each in rates["settings"].items()
    ]
    return markdown(
        head, [*rows, ["all but the first", "", "", *rule_cells(rates["others"])]]
    )


def limits_table(rates: dict[str, Any]) -> str:
    """The rule with other limits."""
    rows = [
        [name, limit, *map(share, counts.values())]
        for name, limits in rates["limits"].items()
        for limit, counts in limits.items()
    ]
    head = ["statistic", "limit", "bad flagged", "between flagged", "good flagged"]
    return markdown(head, rows)


def alternatives_table(rates: dict[str, Any]) -> str:
    """Other statistics, with limits chosen on half of the settings."""
    rows = []
    for name, row in rates["alternatives"].items():
        cells = [name, f"{row['auc']:.2f}", f"{row['limit']:.3g}"]
        for place in ("chosen", "tested"):
            cells += [share(row[place][each]) for each in ("bad", "good")]
        rows.append(cells)
    head = [
        "statistic",
        "AUC",
        "limit",
        "chosen on: bad",
        "good",
        "tested: bad",
        "good",
    ]
    return markdown(head, rows)


def tables(rates: dict[str, Any]) -> dict[str, str]:
    """All of them, by their titles."""
    return {
        "Too high a learning rate, by setting": settings_table(rates),
        "By limit": limits_table(rates),
        "By statistic": alternatives_table(rates),
    }
