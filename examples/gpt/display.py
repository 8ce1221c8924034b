"""Shows a run: on the console while it trains, and as a picture of its log."""

import json
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text
from writers import Row, Writer

_BLUE, _ORANGE, _GREY, _INK = "#2f6db5", "#e07b39", "#9aa5b1", "#25303b"


def count(value: float) -> str:
    """A large number as people say it: 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _or_dash(value: float, form: str = ".2f") -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _noise(row: Row) -> str:
    """The noise scale with its interval, or what is known of it."""
    scale, low = row["noise_scale/b_simple"], row["noise_scale/low"]
    if math.isfinite(scale):
        return f"noise {count(scale)} ({count(low)}–{count(row['noise_scale/high'])})"
    return f"noise ≥ {count(low)}" if low > 0 else "noise –"


def _printable(text: str) -> str:
    """The text without characters that could steer the terminal."""
    keep = [c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4)]
    return "".join(keep)


class Screen(Writer):
    """A live line in a terminal; log lines, without control characters, elsewhere."""

    def __init__(self, steps: int, log_every: int, unit: str):
        """Starts the live line; ``unit`` is what a token is."""
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._steps, self._log_every, self._unit = steps, log_every, unit
        self._clipped = 0
        bar = BarColumn(None, table_column=Column(ratio=1))  # takes what room is left
        text = TextColumn("{task.description}", table_column=Column())
        columns = MofNCompleteColumn(), bar, text
        self._live = Progress(*columns, console=self.console, expand=True)
        self._live.disable = not self.console.is_terminal
        self._task = self._live.add_task("compiling …", total=steps)
        self._live.start()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints above the live line."""
        self.console.print(Text(text, style))

    def _pace(self, tokens_per_step: float) -> str:
        """Speed of late and time left; the first step, which compiles, is left out."""
        task = self._live.tasks[self._task]
        if not task.speed:
            return "– tok/s  eta –"
        eta = timedelta(seconds=task.time_remaining or 0)
        return f"{count(task.speed * tokens_per_step)} tok/s  eta {eta}"

    def write(self, step: int, row: Row) -> None:
        """Shows a step of training, or what the held-out part says."""
        at = f"step {step:>{len(str(self._steps))}}  "
        if "eval/loss" in row:
            text = f"held-out loss {row['eval/loss']:.3f} = {row['eval/bits']:.3f} bits"
            seen = f"{count(row['tokens'])} {self._unit}s"
            self.say(f"{at}{text}/{self._unit}  after {seen}", "bold")
            return
        self._live.update(self._task, completed=step)
        norm, limit = row["grad/norm"], row["clip/limit"]
        text = f"loss {_or_dash(row['loss'], '.3f')}  grad {_or_dash(norm)}"
        text += f" limit {_or_dash(limit)}  {_noise(row)}"
        text += f"  {self._pace(row['tokens'] / step)}"
        self._live.update(self._task, description=text)
        self._clipped += norm > limit and not row.get("skip/skipped")
        if not self.console.is_terminal and step % self._log_every == 0:
            text += f"  clipped {self._clipped / step:.0%}"
            if row.get("skip/total", 0):
                text += f"  skipped {row['skip/total']:.0f}"
            self.say(f"{at}{text}  lr {row['learning_rate']:.1e}")

    def sample(self, prompt: str, written: str) -> None:
        """Shows what the model writes, apart from what it was given."""
        self.say("\n" + " held-out text, and how the model goes on ".center(79, "─"))
        parts = (_printable(prompt), "dim"), (_printable(written), "bold green")
        self.console.print(Text.assemble(*parts))
        self.say("─" * 79)


def _column(rows: Sequence[dict], key: str) -> np.ndarray:
    """One number per row; NaN for null, and where there is none."""
    return np.array([row.get(key) for row in rows], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the neighbours, those that are finite: no lag, unlike an average kept."""
    kernel = np.ones(1 + len(values) // 40)
    number = np.convolve(np.isfinite(values), kernel, "same")
    total = np.convolve(np.nan_to_num(values), kernel, "same")
    return total / np.where(number > 0, number, np.nan)


def _draw_loss(axes: Axes, rows: Sequence[dict], evaluations: Sequence[dict]) -> None:
    step, loss = _column(rows, "step"), _column(rows, "loss")
    axes.plot(step, loss, color=_BLUE, alpha=0.3, lw=0.7)
    axes.plot(step, _smooth(loss), color=_BLUE, lw=1.8, label="training")
    at, held_out = _column(evaluations, "step"), _column(evaluations, "eval/loss")
    axes.plot(at, held_out, "o", color=_ORANGE, mec="white", ms=7, label="held out")
    number = f"{held_out[-1]:.2f}\n"
    axes.text(at[-1], held_out[-1], number, color=_ORANGE, ha="center", weight="bold")


def _draw_norm(axes: Axes, rows: Sequence[dict]) -> None:
    step, norm = _column(rows, "step"), _column(rows, "grad/norm")
    limit = _column(rows, "clip/limit")
    skipped = _column(rows, "skip/skipped") > 0
    above = (norm > limit) & ~skipped
    axes.plot(step, norm, color=_BLUE, lw=0.8, label="gradient norm")
    axes.plot(step, limit, color=_INK, lw=0.8, label="clip limit")
    axes.plot(step[above], norm[above], "o", color=_ORANGE, ms=3, label="clipped")
    if skipped.any():
        at = np.where(np.isfinite(norm), norm, limit)[skipped]
        axes.plot(step[skipped], at, "x", color=_INK, ms=6, label="skipped")


def _draw_noise(axes: Axes, rows: Sequence[dict], batch_size: int) -> None:
    step, scale = _column(rows, "step"), _column(rows, "noise_scale/b_simple")
    low, high = _column(rows, "noise_scale/low"), _column(rows, "noise_scale/high")
    bound = np.where(np.isnan(scale) & (low > 0), low, np.nan)
    axes.fill_between(step, low, high, color=_BLUE, alpha=0.2, label="95 % interval")
    axes.plot(step, scale, color=_BLUE, lw=1.8, label="noise scale")
    if np.isfinite(bound).any():
        axes.plot(step, bound, color=_BLUE, lw=1.8, ls=":", label="lower bound")
    axes.axhline(batch_size, color=_INK, lw=0.8, label="batch size")
    shown = np.concatenate([scale, bound, [batch_size]])
    axes.set_ylim(np.nanmin(shown) / 2, 5 * np.nanmax(shown))


def draw(log: Path, picture: Path, title: str, batch_size: int) -> None:
    """Draws loss, gradient norm, noise scale and learning rate over the steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]
    figure = Figure(figsize=(9, 10), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=_INK, weight="bold", size=12)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[4, 3, 3, 1.5])
    _draw_loss(panels[0], rows, [line for line in lines if "eval/loss" in line])
    _draw_norm(panels[1], rows)
    _draw_noise(panels[2], rows, batch_size)
    rate = _column(rows, "learning_rate")
    panels[3].fill_between(_column(rows, "step"), rate, color=_GREY, alpha=0.4, lw=0)
    panels[3].set(xlabel="step", ylim=(0, None))
    labels = "loss (nats)", "gradient norm", "noise scale (windows)", "learning rate"
    for axes, label in zip(panels, labels, strict=True):
        axes.set(ylabel=label, axisbelow=True, xmargin=0.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6eaee", lw=0.8)
    for axes in panels[1:3]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in panels[:3]:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=4)
    figure.align_ylabels()
    figure.savefig(picture, dpi=150)
