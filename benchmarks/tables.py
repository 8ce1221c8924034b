"""The tables of the docs, and a page per device, made from ``benchmarks/results``.

Between ``<!-- table NAME -->`` and ``<!-- end -->`` the README or a page of
``docs/evidence`` shows what the function of that name says below, and under it where
the numbers come from. The page ``results/<device>.md`` shows all tables of all suites.

    python benchmarks/tables.py    # rewrites them
"""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import accelerator_programs
import accumulation
import batch_invariance
import branching
import clean_cost
import diagnosis
import fault_table
import growth
import low_precision
import many_devices
import noise_norms
import noise_scale
import noise_truth
import norm_taps
import reliability
import spike_detection
import stability
import step_cost
import trainer_step
from reporting import RESULTS, Report, caption, read, read_all

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "evidence").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def only(tables: Callable[[Report], dict[str, str]]) -> Callable[[Report], str]:
    """The table of a suite that has one."""

    def table(report: Report) -> str:
        (found,) = tables(report).values()
        return found

    return table


# Name in the docs to the suite whose report it shows, and how.
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "stability_short": ("stability_small", stability.short_table),
    "stability": ("stability_small", stability.peers_table),
    "stability_skips": ("stability_small", stability.peers_skips),
    "stability_parts": ("stability_small", stability.parts_table),
    "stability_large": ("stability_large", stability.grid_table),
    "stability_microbatches": ("stability_microbatches", stability.grid_table),
    "stability_muon": ("stability_muon", stability.grid_table),
    "stability_branch": ("stability_branch", stability.grid_table),
    "stability_branch_large": ("stability_branch_large", stability.grid_table),
    "clean_small": ("clean_cost_small", only(clean_cost.tables)),
    "clean_english": ("clean_cost_english", only(clean_cost.tables)),
    "clean_long": ("clean_cost_long", only(clean_cost.tables)),
    "clean_large": ("clean_cost_large", only(clean_cost.tables)),
    "branching_cost": ("branching", branching.cost_table),
    "branching_exactness": ("branching", branching.exactness_table),
    "reliability": ("reliability", only(reliability.tables)),
    "spike_detection": ("spike_detection", only(spike_detection.tables)),
    "fault_table": ("fault_table", fault_table.readme_table),
    "batch_invariance": ("batch_invariance", batch_invariance.readme_table),
    "messages": ("many_devices", many_devices.message_table),
    "memory": ("many_devices", many_devices.memory_table),
    "diagnosis": ("diagnosis", only(diagnosis.tables)),
    "step_cost": ("step_cost", step_cost.readme_table),
    "by_parameters": ("growth", growth.parameters_table),
    "by_leaves": ("growth", growth.leaves_table),
    "by_microbatches": ("growth", growth.microbatch_table),
    "by_length": ("growth", growth.history_table),
    "accumulation": ("accumulation", accumulation.readme_table),
    "noise_scale": ("noise_scale", noise_scale.readme_table),
    "noise_truth": ("noise_truth", noise_truth.evidence_table),
    "noise_norms_truth": ("noise_norms", noise_norms.truth_evidence),
    "noise_norms_worth": ("noise_norms", noise_norms.worth_evidence),
    "norm_taps": ("noise_scale", norm_taps.readme_table),
    "trainer_step": ("trainer_step", trainer_step.readme_table),
    "accelerators": ("accelerator_programs", accelerator_programs.readme_table),
    "low_precision": ("low_precision", only(low_precision.tables)),
}


def block(name: str) -> str:
    """A table and where it comes from."""
    suite, table = TABLES[name]
    report = read(suite)
    return f"\n{table(report)}\n\n{caption(report)}\n\n"


def render(text: str) -> str:
    """The text with all its tables as they should be."""
    return _BLOCK.sub(lambda found: found[1] + block(found[2]) + found[3], text)


def page(path: Path) -> str:
    """All tables of a device, from its JSON."""
    parts, reports = [], read_all(path)
    for suite, report in reports.items():
        parts.append(f"## {suite}")
        module = importlib.import_module(Path(report["command"].split()[1]).stem)
        for title, table in module.tables(report).items():
            parts += [f"**{title}**", table]
        parts.append(caption(report))
    device = next(iter(reports.values()))["device"]
    return "\n\n".join([f"# {device}", *parts]) + "\n"


def main() -> None:
    """Rewrites all pages; says which tables no page shows."""
    for path in RESULTS.glob("*.json"):
        path.with_suffix(".md").write_text(page(path))
    pages = {path: path.read_text() for path in PAGES}
    shown = {name for text in pages.values() for _, name, _ in _BLOCK.findall(text)}
    if missing := sorted(TABLES.keys() - shown):
        sys.exit(f"No page has a place for {', '.join(missing)}")
    for path, text in pages.items():
        path.write_text(render(text))


if __name__ == "__main__":
    main()
