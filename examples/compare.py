"""Trains the same GPT with the stability chain and with plain optax, side by side.

    python examples/compare.py --inject bytes@200x5 nan@300
    python examples/compare.py --inject bytes@200x20 --sides skip branch rewind plain

Takes every flag of ``gpt/train.py``. All runs have the same model, data, schedule and
faults. Each run has its own folder under ``--out``: the same command, given again,
trains nothing and only shows the results. Prints a table and draws ``compare.png``.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent / "gpt"))
import train
from command import run_command
from config import Config
from drawing import SIDES, Rows, column, draw
from inputs import InputError

from optax_stability.faults import parse_faults
from optax_stability.loop import DivergedError


@dataclasses.dataclass(frozen=True)
class Comparison(Config):
    """Trains the same GPT in several ways, and compares the runs."""

    out: Path = Path("runs/compare")
    sides: tuple[Literal["skip", "branch", "rewind", "plain"], ...] = ("skip", "plain")
    """The runs to compare: reactions to a spike, and plain optax."""

    def of(self, side: str) -> Config:
        """The settings of one run."""
        names = [each.name for each in dataclasses.fields(Config)]
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        settings |= {"out": self.out / side, "baseline": side == "plain"}
        if side != "plain":
            settings["on_spike"] = side
        return Config(**settings)


def _train(config: Config) -> Rows:
    """Trains one run and returns its log, also if the run diverged."""
    try:
        train.train(config)
    except DivergedError as error:
        sys.stderr.write(f"{error}\n")
    lines = (config.out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def summarise(rows: Rows) -> dict[str, str]:
    """The results of a run, by name."""
    loss, held_out = column(rows, "loss"), column(rows, "eval/loss")
    rollbacks = column(rows, "branch/rollbacks")
    clipped = column(rows, "grad/norm") > column(rows, "clip/limit")
    return {
        "held-out loss at the end": _number(
            held_out[-1] if held_out.size else math.nan
        ),
        "best held-out loss": _number(np.nanmin([*held_out, math.inf])),
        "losses that are not finite": str(int((~np.isfinite(loss)).sum())),
        "steps skipped": f"{column(rows, 'skip/skipped').sum():.0f}",
        "steps clipped": f"{clipped.sum():.0f}",
        "branches taken back": f"{rollbacks.max(initial=0):.0f}",
        "rewinds": str(column(rows, "rewind/to").size),
    }


def show(runs: dict[str, Rows]) -> None:
    """Prints the summaries in columns."""
    table = Table("", *(SIDES[side].name for side in runs))
    columns = [summarise(rows) for rows in runs.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    # Wide enough for four sides, also if the output is a file.
    Console(width=max(Console().width, 90)).print(table)


def compare(comparison: Comparison) -> dict[str, Rows]:
    """Trains all sides, prints the table and draws the figure."""
    if not comparison.sides:
        raise InputError(f"--sides: no side is given; give some of {', '.join(SIDES)}")
    runs = {side: _train(comparison.of(side)) for side in comparison.sides}
    show(runs)
    injected = parse_faults(comparison.inject)
    draw(runs, injected, comparison.out / "compare.png")
    return runs


def main() -> None:
    """Runs the command line."""
    run_command(lambda: compare(tyro.cli(Comparison)))


if __name__ == "__main__":
    main()
