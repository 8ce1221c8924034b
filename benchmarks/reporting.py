"""Where results are kept and how they are shown: one JSON file per device.

Every suite writes its report under its own name into ``results/<device>.json``, with
the versions, the hardware, the date and the command it came from; ``tables.py`` makes
the tables of the docs of it.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import optax_stability as ost

RESULTS = Path(__file__).parent / "results"
CPU = "cpu"

Report = dict[str, Any]
# From a report to Markdown tables by their titles.
Tables = Callable[[Report], dict[str, str]]


def command() -> str:
    """What was called: a file, or a folder, which is called by its ``__main__.py``."""
    script = Path(sys.argv[0]).resolve()
    suite = script.parent if script.name == "__main__.py" else script
    return " ".join(["python", f"benchmarks/{suite.name}", *sys.argv[1:]])


def machine() -> Report:
    """What the numbers are measured on, with what, when and how."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "version": ost.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command(),
    }


def on_cpu() -> bool:
    """Whether the device is a CPU, which has few cores to spare."""
    return jax.default_backend() == CPU


def path_of(device: str) -> Path:
    """The file of a device, by the name that JAX gives it."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '_', device.lower())}.json"


def read_all(path: Path) -> dict[str, Report]:
    """The reports of a device, by suite."""
    return json.loads(path.read_text()) if path.exists() else {}


def read(suite: str, device: str = CPU) -> Report:
    """The report of the last full run of a suite."""
    return read_all(path_of(device))[suite]


def devices_with(suite: str) -> dict[str, Report]:
    """The reports of a suite, by file: of every device that has one."""
    found = {path.stem: read_all(path) for path in sorted(RESULTS.glob("*.json"))}
    return {name: reports[suite] for name, reports in found.items() if suite in reports}


def save(suite: str, report: Report) -> None:
    """Puts a report into the file of this device; the other suites keep theirs."""
    RESULTS.mkdir(exist_ok=True)
    path = path_of(report["device"])
    reports = dict(sorted((read_all(path) | {suite: report}).items()))
    text = json.dumps(reports, indent=1, ensure_ascii=False)
    # One line to a list of numbers or words.
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line that all suites share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="small and short, no JSON")
    return made


def finish(suite: str, report: Report, tables: Tables, *, quick: bool) -> None:
    """Prints the tables of a report, and keeps it if it was a full run."""
    report = machine() | report
    for title, table in tables(report).items():
        sys.stdout.write(f"\n{title}\n\n{table}\n")
    if not quick:
        save(suite, report)


def run_suite(
    suite: str, doc: str | None, measure: Callable[[bool], Report], tables: Tables
) -> None:
    """A suite that has no other options, from its command line to its JSON."""
    quick = parser(doc).parse_args().quick
    finish(suite, measure(quick), tables, quick=quick)


def hardware(report: Report) -> str:
    """What a report was measured on, for a reader."""
    if report["device"] == CPU:
        return f"{report['cores']} CPU cores"
    return report["device"]


def caption(report: Report) -> str:
    """One line that says where a table comes from."""
    return (
        f"<sub>{hardware(report)}, Python {report['python']}, JAX {report['jax']}, "
        f"optax {report['optax']}, {report['date']}: `{report['command']}`</sub>"
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rules = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rules, *rows])


def share(counts: list[int]) -> str:
    """So many of so many."""
    return f"{counts[0]} of {counts[1]}" if counts[1] else "–"


def quartiles(row: dict[str, float], digits: int) -> str:
    """Median (low–high)."""
    low, middle, high = (f"{row[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{middle} ({low}–{high})"
