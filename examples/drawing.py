"""What ``compare.py`` draws: a panel for each run, in the look of a report."""

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from optax_stability.faults import Fault

Rows = list[dict[str, float]]


class Side(NamedTuple):
    """How a run looks: a curve that others cover is wider, to show beside them."""

    name: str
    color: str
    marker: str
    width: float


# The reactions to a spike, and plain optax, which does not react.
SIDES = {
    "skip": Side("optax_stability", "C0", "o", 1.0),
    "branch": Side("branch", "C3", "s", 1.6),
    "rewind": Side("rewind", "C2", "^", 2.2),
    "plain": Side("plain optax", "C1", "X", 2.8),
}


def column(rows: Rows, key: str) -> np.ndarray:
    """The values of one key, over all rows that have it; null is NaN."""
    return np.array([row[key] for row in rows if key in row], float)


def _draw_loss(axes: Axes, side: str, rows: Rows) -> None:
    """Draws the loss of one run over its batches, and what happened to it."""
    # A rewind has no loss, which interrupts the curve. Probes are left out: their loss
    # was measured on the kept parameters.
    steps = [row for row in rows if "loss" in row or "rewind/to" in row]
    steps = [row for row in steps if not row.get("branch/probed")]
    color, batch = SIDES[side].color, column(steps, "batch")
    loss = np.array([row.get("loss", math.nan) for row in steps], float)
    axes.plot(batch, loss, color=color, lw=1)
    axes.set(title=SIDES[side].name, ylabel="loss of the batch")
    _mark_end(axes, batch, loss, color)
    _mark_rewinds(axes, rows)
    _mark_branches(axes, steps)


def _mark_end(axes: Axes, batch: np.ndarray, loss: np.ndarray, color: str) -> None:
    """Marks where the loss became NaN for good."""
    *_, last = -1, *np.flatnonzero(np.isfinite(loss))
    if 0 <= last < loss.size - 1:
        point = batch[last], loss[last]
        axes.plot(*point, color=color, marker="X", ms=8)
        axes.annotate(
            "not a number from here", point, (8, 4), textcoords="offset points"
        )


def _mark_rewinds(axes: Axes, rows: Rows) -> None:
    """Draws a line where the run went back to a checkpoint."""
    across = axes.get_xaxis_transform()
    for row in rows:
        if "rewind/to" in row:
            axes.axvline(row["batch"], color="C2", lw=0.8, ls=(0, (1, 2)))
            text = f" back to step {row['rewind/to']:.0f}"
            axes.text(row["batch"], 0.97, text, transform=across, va="top")


def _mark_branches(axes: Axes, steps: Rows) -> None:
    """Draws a bar while a branch is open, and says where it was taken back."""
    across = axes.get_xaxis_transform()
    batch = column(steps, "batch")
    mode, rollbacks = (
        np.array([row.get(key, 0) for row in steps], float)
        for key in ("branch/mode", "branch/rollbacks")
    )
    style = {"color": "C2", "lw": 0, "transform": across}
    axes.fill_between(batch, 0, 0.04, where=mode > 0, **style)
    for at in batch[1:][np.diff(rollbacks) > 0]:
        axes.text(at, 0.97, " branch taken back", transform=across, va="top")


def _draw_held_out(axes: Axes, runs: dict[str, Rows]) -> None:
    """Draws the held-out losses of all runs, but those before the first step."""
    for side, rows in reversed(runs.items()):
        name, color, marker, width = SIDES[side]
        measured = [row for row in rows if "eval/loss" in row and row["step"]]
        points = column(measured, "batch"), column(measured, "eval/loss")
        style = {"color": color, "lw": width, "marker": marker, "ms": 3 + 1.5 * width}
        axes.plot(*points, **style, label=name)
    axes.set(title="Held-out loss", ylabel="loss", xlabel="batch")
    axes.legend()


def _mark_faults(axes: Axes, injected: tuple[Fault, ...], *, named: bool) -> None:
    """Shades the batches that were broken on purpose."""
    across = axes.get_xaxis_transform()
    for fault in injected:
        axes.axvspan(fault.first, fault.first + fault.length, color="C3", alpha=0.3)
        many = f" × {fault.length}" * (fault.length > 1)
        if named:
            axes.text(fault.first, 1.02, fault.kind + many, transform=across)


def draw(runs: dict[str, Rows], injected: tuple[Fault, ...], path: Path) -> None:
    """Draws the training loss of each run, the held-out losses of all, and the faults.

    Each run has a panel: before the first fault one curve would hide the others.
    """
    count = len(runs) + 1
    with plt.style.context("optax_stability.report"):
        figure, panels = plt.subplots(
            *(count, 1), figsize=(9, 1.9 * count), sharex=True, layout="constrained"
        )
        *losses, held_out = panels
        for axes, (side, rows) in zip(losses, runs.items(), strict=True):
            axes.sharey(losses[0])
            _draw_loss(axes, side, rows)
            _mark_faults(axes, injected, named=axes is losses[0])
        losses[0].set_title(losses[0].get_title(loc="left"), pad=18)
        _draw_held_out(held_out, runs)
        figure.savefig(path, dpi=150)
        plt.close(figure)
