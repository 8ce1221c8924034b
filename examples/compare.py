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
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent / "gpt"))
import train
from command import run_command
from config import Config
from inputs import InputError

from optax_stability.faults import Fault, parse_faults
from optax_stability.loop import DivergedError

Rows = list[dict[str, float]]


class Side(NamedTuple):
    """Name of one of the runs, and how its curve looks.

    Colours are those of the reports, told apart without colour vision; a curve that
    others cover is wider, so that it shows on either side of them.
    """

    name: str
    color: str
    width: float = 1.0
    marker: str = "o"


# The reactions to a spike, and plain optax, which does not react.
SIDES = {
    "skip": Side("optax_stability", "#0062a8"),
    "branch": Side("branch", "#009e73", 1.4, "s"),
    "rewind": Side("rewind", "#56606a", 2.0, "^"),
    "plain": Side("plain optax", "#d55e00", 2.6, "X"),
}


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


def _column(rows: Rows, key: str) -> np.ndarray:
    """The values of one key, over all rows that have it; null is NaN."""
    return np.array([row[key] for row in rows if key in row], float)


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def summarise(rows: Rows) -> dict[str, str]:
    """The results of a run, by name."""
    loss, held_out = _column(rows, "loss"), _column(rows, "eval/loss")
    rollbacks = _column(rows, "branch/rollbacks")
    clipped = _column(rows, "grad/norm") > _column(rows, "clip/limit")
    return {
        "held-out loss at the end": _number(
            held_out[-1] if held_out.size else math.nan
        ),
        "best held-out loss": _number(np.nanmin([*held_out, math.inf])),
        "losses that are not finite": str(int((~np.isfinite(loss)).sum())),
        "steps skipped": f"{_column(rows, 'skip/skipped').sum():.0f}",
        "steps clipped": f"{clipped.sum():.0f}",
        "branches taken back": f"{rollbacks.max(initial=0):.0f}",
        "rewinds": str(_column(rows, "rewind/to").size),
    }


def show(runs: dict[str, Rows]) -> None:
    """Prints the summaries in columns."""
    table = Table("", *(SIDES[side].name for side in runs))
    columns = [summarise(rows) for rows in runs.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    # Wide enough for four sides, also if the output is a file.
    Console(width=max(Console().width, 90)).print(table)


def _draw_run(losses: Axes, held_out: Axes, side: str, rows: Rows) -> None:
    """Draws one run over its batches, and marks rewinds and where it became NaN."""
    name, color, width, marker = SIDES[side]
    # A rewind has no loss, which interrupts the curve. Probes are left out: their loss
    # was measured on the kept parameters.
    steps = [row for row in rows if "loss" in row or "rewind/to" in row]
    steps = [row for row in steps if not row.get("branch/probed")]
    batch = _column(steps, "batch")
    loss = np.array([row.get("loss", math.nan) for row in steps], float)
    losses.plot(batch, loss, color=color, lw=width, label=name)
    finite = np.flatnonzero(np.isfinite(loss))
    if finite.size and finite[-1] < loss.size - 1:
        point = batch[finite[-1]], loss[finite[-1]]
        losses.plot(*point, color=color, marker="X", ms=9)
        label = "not a number from here"
        losses.annotate(label, point, (6, 6), textcoords="offset points", color=color)
    measured = [row for row in rows if "eval/loss" in row]
    points = _column(measured, "batch"), _column(measured, "eval/loss")
    held_out.plot(*points, color=color, lw=width, marker=marker, ms=5 + width)
    across = losses.get_xaxis_transform()
    for row in rows:
        if "rewind/to" in row:
            label = f" back to step {row['rewind/to']:.0f}"
            losses.axvline(row["batch"], color=color, ls=":")
            losses.text(row["batch"], 0.9, label, transform=across, color=color)
    _draw_branches(losses, color, steps)


def _draw_branches(losses: Axes, color: str, steps: Rows) -> None:
    """Draws a bar while a branch is open, and a label where it was taken back."""
    across = losses.get_xaxis_transform()
    batch = _column(steps, "batch")
    mode, rollbacks = (
        np.array([row.get(key, 0) for row in steps], float)
        for key in ("branch/mode", "branch/rollbacks")
    )
    losses.fill_between(
        batch, 0, 0.03, where=mode > 0, transform=across, color=color, lw=0
    )
    for at in batch[1:][np.diff(rollbacks) > 0]:
        losses.text(at, 0.03, " taken back", transform=across, color=color)


def draw(runs: dict[str, Rows], injected: tuple[Fault, ...], path: Path) -> None:
    """Draws the training and held-out losses of all runs, and the injected faults."""
    figure, (losses, held_out) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    for side, rows in reversed(runs.items()):
        _draw_run(losses, held_out, side, rows)
    across = losses.get_xaxis_transform()
    for fault in injected:
        end = fault.first + fault.length
        losses.axvspan(fault.first, end, color="black", alpha=0.12, lw=0.8)
        label = f"{fault.kind} × {fault.length}" if fault.length > 1 else fault.kind
        losses.text(fault.first, 1.01, label, transform=across)
    losses.set(ylabel="loss of the batch")
    held_out.set(ylabel="held-out loss", xlabel="batch")
    losses.legend(frameon=False, loc="upper right")
    for axes in (losses, held_out):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
