"""Writes a page for each finding of the diagnosis: docs/findings/KIND.md.

Each has a picture of a made-up run, what the finding means, how it is computed, causes
and cures from the library itself, and how often it is wrong: measured on healthy
made-up runs and on the public logs of ``benchmarks/real_logs.py``.

    python docs/make_findings.py           # pages and pictures
    python docs/make_findings.py --rates   # measures the rates again; a minute
"""

import collections
import hashlib
import importlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._advice import ADVICE
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import KINDS, Finding, Kind
from optax_stability._diagnosis._words import WORDS
from optax_stability._report import _page
from optax_stability._report._drawing import (
    _axes,
    _curve_panels,
    _curves,
    _figures,
    _panels,
)
from optax_stability._report._drawing._curves import Run
from optax_stability._report._drawing._panels import Panel

ROOT = Path(__file__).parents[1]
PAGES = Path(__file__).parent / "findings"
RATES = PAGES / "rates.json"
RUNS = 2000

TEXTS: dict[Kind, dict[str, str]] = tomllib.loads((PAGES / "texts.toml").read_text())


def fault_of(kind: Kind) -> tuple[dict[str, np.ndarray], Finding]:
    """A history that shows a kind, and the finding."""
    histories = importlib.import_module("histories")
    for fault in histories.FAULTS:
        if fault()[0] != kind:
            continue
        history = fault()[-1]
        if len(history["step"]) >= 60:
            (found,) = [each for each in diagnose(history) if each.kind == kind]
            return history, found
    raise LookupError(f"no history of {kind!r} has 60 rows; add one to histories.py")


def panels_of(run: Run, found: Finding) -> list[Panel]:
    """The loss, and the metric that shows the problem."""
    known = {each.name: each for each in _panels.shown(run)}
    drawn = {"loss": "loss", "eval/loss": "loss", "learning_rate": "rate"}
    drawn |= {"grad/norm": "gradient"}
    chosen = [
        known[name] for name in ("loss", drawn.get(found.metric)) if name in known
    ]
    if found.metric in drawn or found.metric == "step":
        return list(dict.fromkeys(chosen))
    values = run.train.columns[found.metric]

    def draw(axes: Axes, run: Run) -> None:
        _curve_panels.draw_curve(
            axes, run, values, color=_axes.BLUE, lw=1.2, label="value"
        )
        spread = _curves.finite(values)
        spread = spread[~np.isnan(spread)]
        if spread.min() > 0 and spread.max() > 30 * spread.min():
            _axes.set_log_scale(axes, values)
        else:
            _axes.set_linear_scale(axes, (float(spread.min()), float(spread.max())))
        _axes.mark_nonfinite(axes, run.train.columns["step"], values)

    name = found.metric
    return [*chosen, Panel(name, name, "", (name,), lambda run: 1.8, 0.0, draw)]


def picture(kind: Kind) -> bytes:
    """The picture of a kind, as SVG."""
    history, found = fault_of(kind)
    run = _curves.read(history)
    drawn = _figures.render(run, panels_of(run, found), [found], "svg", salt=kind)
    # One line: nobody reads it, and a change of it is one line.
    return b" ".join(drawn.content.split()) + b"\n"


def measure_rates() -> dict[str, Any]:
    """How many healthy runs have a finding, by kind."""
    histories = importlib.import_module("histories")
    synthetic = importlib.import_module("synthetic_runs")
    logs: collections.Counter[str] = collections.Counter()
    recorded: collections.Counter[str] = collections.Counter()
    for seed in range(RUNS):
        make = synthetic.with_held_out if seed % 2 else synthetic.healthy
        logs.update(each.kind for each in diagnose(make(seed).history))
    for seed in range(RUNS // 4):
        noise = (0.02, 0.1, 0.3)[seed % 3]
        history = histories.healthy(seed, noise=noise, decays=bool(seed % 2))
        recorded.update(each.kind for each in diagnose(history))
    return {
        "logs": {"runs": RUNS, "found": dict(sorted(logs.items()))},
        "recorded": {"runs": RUNS // 4, "found": dict(sorted(recorded.items()))},
    }


def rate_text(kind: Kind, rates: dict[str, Any]) -> str:
    """How often a kind was found in health."""
    logs, recorded = rates["logs"], rates["recorded"]
    return (
        f"Found in {logs['found'].get(kind, 0)} of {logs['runs']:,} healthy made-up "
        "logs (20 to 1,200 rows of 1 to 50 steps; loss, norm, learning rate and "
        "held-out loss; half of the noise has heavy tails or a memory), and in "
        f"{recorded['found'].get(kind, 0)} of {recorded['runs']:,} that have all "
        "metrics of this library. What the public logs of real runs give is in the "
        "[results](../../benchmarks/results/cpu.md) of `benchmarks/real_logs.py`."
    )


def page(kind: Kind, rates: dict[str, Any]) -> str:
    """The page of a kind."""
    text = TEXTS[kind]
    advice = ADVICE[kind]
    causes = "\n".join(f"- {each}" for each in advice.causes)
    cures = "\n".join(f"{i}. {each}" for i, each in enumerate(advice.remedies, 1))
    words = "\n".join(f"- {each}" for each in WORDS[kind])
    return f"""<!-- Made by docs/make_findings.py. -->
# {_page.title_of(kind)}

`{kind}` · [all findings](README.md)

![A made-up run with this finding; the dotted line is its step.]({kind}.svg)

## What it means

{text["meaning"].strip()}

## How it is computed

{text["rule"].strip()}

Every number is in
[`_limits.py`](../../optax_stability/_diagnosis/_limits.py), with its origin.

## Likely causes

{causes}

## What helps

With this library and optax:

{cures}

With any other:

{words}

## How often it is wrong

{rate_text(kind, rates)}
"""


def index() -> str:
    """The page that lists all kinds."""
    rows = "\n".join(
        f"| [`{kind}`]({kind}.md) | {_page.title_of(kind)} |" for kind in KINDS
    )
    return f"""<!-- Made by docs/make_findings.py. -->
# Findings

What `diagnose` and the command `optax-stability diagnose PATH` look for, the most
severe first. What they need is printed with each diagnosis, and so is what could not be
looked at.

| kind | what |
|---|---|
{rows}
"""


def fingerprint() -> str:
    """Of everything that a picture is made of; changes when one of these files does."""
    files = [
        Path(__file__),
        ROOT / "tests" / "diagnosis" / "histories.py",
        ROOT / "optax_stability" / "report.mplstyle",
        *sorted((ROOT / "optax_stability" / "_report" / "_drawing").glob("*.py")),
    ]
    content = b"".join(each.read_bytes() for each in files)
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    """Writes all pages and pictures."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "diagnosis")]
    PAGES.mkdir(exist_ok=True)
    if "--rates" in sys.argv or not RATES.exists():
        RATES.write_text(json.dumps(measure_rates(), indent=1) + "\n")
    rates = json.loads(RATES.read_text())
    _atomic_file.write(PAGES / "README.md", index().encode())
    for kind in KINDS:
        _atomic_file.write(PAGES / f"{kind}.md", page(kind, rates).encode())
        _atomic_file.write(PAGES / f"{kind}.svg", picture(kind))
    (PAGES / "fingerprint").write_text(fingerprint() + "\n")


if __name__ == "__main__":
    main()
