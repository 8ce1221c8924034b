"""Shows a run while it trains and keeps it: console, JSONL log, picture."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from data import InputError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

Row = Mapping[str, float]

_BLUE, _ORANGE, _GREY, _INK = "#2f6db5", "#e07b39", "#9aa5b1", "#25303b"


def start_log(folder: Path) -> Path:
    """Makes an empty ``log.jsonl``, and its folder; an InputError if it cannot."""
    path = folder / "log.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    except OSError as error:
        raise InputError(
            f"--out: cannot write to {folder} ({error.strerror}); give another folder"
        ) from error
    return path


def append(log: Path, row: Row) -> None:
    """Adds one line; JSON has no infinity, so what is not finite becomes null."""
    finite = {key: x if math.isfinite(x) else None for key, x in row.items()}
    with log.open("a") as file:
        file.write(json.dumps(finite) + "\n")


def count(value: float) -> str:
    """A large number as people say it: 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _or_dash(value: float, form: str = ".2f") -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _printable(text: str) -> str:
    """The text without characters that could steer the terminal."""
    keep = [c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4)]
    return "".join(keep)


class Screen:
    """A live line in a terminal; log lines, without control characters, elsewhere."""

    def __init__(self, steps: int, tokens_per_step: int, log_every: int, unit: str):
        """Shows nothing yet; ``unit`` is what a token is."""
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.tokens_per_step = tokens_per_step
        self._steps, self._log_every, self._unit = steps, log_every, unit
        self._start: tuple[int, float] | None = None
        self._live = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._live.add_task("compiling …", total=steps)

    def __enter__(self) -> Self:
        """Starts the live line."""
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the terminal as it was, also after an error."""
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints above the live line."""
        self.console.print(Text(text, style))

    def _pace(self, step: int) -> str:
        """Speed and time left, counted from the first step so as to skip compiling."""
        now = time.perf_counter()
        if self._start is None:
            self._start = step, now
            return "– tok/s  eta –"
        seconds_per_step = (now - self._start[1]) / (step - self._start[0])
        speed = self.tokens_per_step / seconds_per_step
        eta = _clock((self._steps - step) * seconds_per_step)
        return f"{count(speed)} tok/s  eta {eta}"

    def step(self, row: Row) -> None:
        """Shows one training step."""
        step = int(row["step"])
        text = f"loss {_or_dash(row['loss'], '.3f')}  grad {_or_dash(row['grad/norm'])}"
        text += f" limit {_or_dash(row['clip/limit'])}  {self._pace(step)}"
        self._live.update(self._task, completed=step, description=text)
        if not self.console.is_terminal and step % self._log_every == 0:
            text += f"  clipped {row['clip/fraction']:.0%}"
            text += f"  skipped {row['skip/total']:.0f}  lr {row['learning_rate']:.1e}"
            self.say(f"step {step:>5}  {text}")

    def evaluation(self, row: Row) -> None:
        """Shows what the held-out part says."""
        self.say(
            f"step {row['step']:>5}  held-out loss {row['eval/loss']:.3f} = "
            f"{row['eval/bits']:.3f} bits/{self._unit}  "
            f"after {count(row['tokens'])} {self._unit}s",
            "bold",
        )

    def sample(self, prompt: str, written: str) -> None:
        """Shows what the model writes, apart from what it was given."""
        self.say("\n" + " held-out text, and how the model goes on ".center(79, "─"))
        parts = (_printable(prompt), "dim"), (_printable(written), "bold green")
        self.console.print(Text.assemble(*parts))
        self.say("─" * 79)


def _column(rows: Sequence[dict], key: str) -> np.ndarray:
    """One number per row; NaN for null."""
    return np.array([row[key] for row in rows], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the neighbours, those that are finite: no lag, unlike an average kept."""
    finite, kernel = np.isfinite(values), np.ones(1 + len(values) // 40)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    number = np.convolve(finite, kernel, "same")
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


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
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw(log: Path, picture: Path, title: str) -> None:
    """Draws loss, gradient norm and learning rate over the steps of a log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]
    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=_INK, weight="bold", size=12)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[4, 3, 1.5])
    _draw_loss(panels[0], rows, [line for line in lines if "eval/loss" in line])
    _draw_norm(panels[1], rows)
    rate = _column(rows, "learning_rate")
    panels[2].fill_between(_column(rows, "step"), rate, color=_GREY, alpha=0.4, lw=0)
    panels[2].set(xlabel="step", ylim=(0, None))
    labels = ("loss (nats)", "gradient norm", "learning rate")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6eaee", lw=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
    for axes in panels[:2]:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3)
    figure.align_ylabels()
    figure.savefig(picture, dpi=150)
