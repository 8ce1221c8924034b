"""Shows a run on the console while it trains."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import devices
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.table import Column
from rich.text import Text

import optax_stability as ost

Row = Mapping[str, Any]


def count(value: float) -> str:
    """A large number with a unit letter: 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _or_dash(value: float, form: str = ".2f") -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _branch(row: Row) -> str:
    """The age of an open branch, and the number of branches taken back, if any."""
    length, rollbacks = row.get("branch/length", 0), row.get("branch/rollbacks", 0)
    is_open = f"branch {length:.0f}  " if length else ""
    return is_open + (f"taken back {rollbacks:.0f}  " if rollbacks else "")


def _noise(row: Row) -> str:
    """The noise scale with its interval, or its lower bound if there is only that."""
    nan = math.nan  # Plain optax has no noise scale.
    scale, low = row.get("noise_scale/b_simple", nan), row.get("noise_scale/low", nan)
    if 0 < scale < math.inf:
        return f"noise {count(scale)} ({count(low)}–{count(row['noise_scale/high'])})"
    return f"noise ≥ {count(low)}" if low > 0 else "noise –"


def _held_out(row: Row, unit: str) -> tuple[str, str]:
    """Bits per byte if known, otherwise per token; and the unit."""
    if "eval/bits_per_byte" in row:
        return f"{row['eval/bits_per_byte']:.3f}", "byte"
    return _or_dash(row.get("eval/bits", math.nan), ".3f"), unit


def _gradient(row: Row) -> str:
    """The gradient norm before and after the clip, and the limit."""
    norm, limit = row["grad/norm"], row["clip/limit"]
    clipped = min(norm, limit) if math.isfinite(norm) else norm
    return f"grad {_or_dash(norm)} → {_or_dash(clipped)} limit {_or_dash(limit)}"


def _speed(row: Row, steps_left: int, tokens_per_step: float) -> str:
    """Tokens per second, the share of the device in use, and the time left."""
    if "perf/tokens_per_second" not in row:
        return "eta –  – tok/s"
    speed = row["perf/tokens_per_second"]
    use = f" mfu {row['perf/mfu']:.0%}" if "perf/mfu" in row else ""
    left = min(round(steps_left * tokens_per_step / speed), 10**9)
    eta = timedelta(seconds=left)  # which has a largest value
    return f"eta {eta}  {count(speed)} tok/s{use}"


def printable(text: str) -> str:
    """The text without control characters."""
    keep = [c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4)]
    return "".join(keep)


def _rechecks(columns: dict[str, np.ndarray], steps: np.ndarray) -> dict:
    """The rechecks in a log, at these steps; NaN where there are none."""
    rows = {step: i for i, step in enumerate(columns["step"].tolist())}
    at = [rows.get(step, -1) for step in np.asarray(steps).tolist()]
    return {
        key: np.append(column, math.nan)[at]
        for key, column in columns.items()
        if key.startswith("recheck/")
    }


def warn(text: str) -> None:
    """Prints what is wrong with a file, as one line, by the first process."""
    if devices.is_first():
        sys.stderr.write(f"note: {text}\n")


@contextlib.contextmanager
def explaining(
    out: Path, title: str, history: Callable[[], dict], screen: "Screen"
) -> Iterator[None]:
    """Writes report and picture of the run within the block, also if that fails."""
    try:
        yield
    finally:
        if devices.is_first():
            columns = ost.read_log(out / "log.jsonl", report=warn)
            kept = history() or columns
            kept |= _rechecks(columns, kept["step"])
            for finding in ost.diagnose(kept):
                screen.say(str(finding), "bold")
            try:
                ost.write_report(kept, out / "report.html", title=title)
                ost.plot_history(columns, out / "training.png")
            except OSError as error:
                warn(f"cannot write a report to {out} ({error.strerror})")
            else:
                screen.say(f"log, picture and report are in {out}")


class Screen:
    """Live lines in a terminal; log lines, without control characters, elsewhere."""

    def __init__(
        self,
        steps: int,
        log_every: int,
        unit: str,
        before: Row | None = None,
        *,
        quiet: bool = False,
    ):
        """Starts the live lines.

        Args:
          steps: last step of the run.
          log_every: steps between log lines.
          unit: ``"byte"`` or ``"token"``.
          before: ``step`` and ``eval/…`` of the checkpoint that the run resumes from.
          quiet: prints nothing, for all processes but the first.
        """
        self.console = Console(
            highlight=False, markup=False, soft_wrap=True, quiet=quiet
        )
        self._steps, self._log_every, self._unit = steps, log_every, unit
        self._written = self._clipped = self._not_finite = 0
        self._loss, self._held_out = math.nan, _held_out(before or {}, unit)[0]
        done = int(before["step"]) if before else 0
        bar = BarColumn(None, table_column=Column(ratio=1))  # takes the remaining width
        self._bar = Progress(MofNCompleteColumn(), bar, expand=True)
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._live = Live(Group(self._bar, Text("compiling …")), console=self.console)
        if self.console.is_terminal and not quiet:
            self._live.start()

    def close(self) -> None:
        """Stops the live lines."""
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints above the live lines."""
        self.console.print(Text(printable(text), style))

    def write(self, step: int, row: Row) -> None:
        """Shows a training step, an evaluation or a rewind."""
        at = f"step {step:>{max(3, len(str(self._steps)))}}  "
        if "eval/loss" in row:
            self._show_evaluation(at, row)
        elif "recheck/verdict" in row:
            self._show_recheck(row)
        elif "rewind/to" in row:
            to = f"back to step {row['rewind/to']:.0f}, continuing with other batches"
            self.say(f"{at}the loss has diverged: {to}", "bold red")
        else:
            self._show_step(at, step, row)

    def _show_evaluation(self, at: str, row: Row) -> None:
        self._held_out, unit = _held_out(row, self._unit)
        text = f"held-out loss {row['eval/loss']:.3f} = {self._held_out} bits/{unit}"
        self.say(f"{at}{text}  after {count(row['tokens'])} {self._unit}s", "bold")

    def _show_recheck(self, row: Row) -> None:
        text = f"the batch of step {row['recheck/step']} was flagged; its loss is now "
        text += f"{row['recheck/loss']:.3g}: "
        verdict = "the machine, and the batch is trained on after all; "
        if row["recheck/verdict"]:
            verdict = "the data, "
        self.say(f"{text}{verdict}highest in {row['recheck/origin']}", "bold")

    def _show_step(self, at: str, step: int, row: Row) -> None:
        # A moving average, because single losses are noisy. Non-finite losses are left
        # out, and probes, which are measured on the kept parameters.
        finite = math.isfinite(row["loss"])
        self._not_finite = 0 if finite else self._not_finite + 1
        if finite and not row.get("branch/probed"):
            old = self._loss if math.isfinite(self._loss) else row["loss"]
            self._loss = 0.9 * old + 0.1 * row["loss"]
        self._written += 1
        self._clipped += (
            row["grad/norm"] > row["clip/limit"] and not row["skip/skipped"]
        )
        loss = _or_dash(self._loss, ".3f")
        if self._not_finite:
            times = f" for {self._not_finite} steps" * (self._not_finite > 1)
            loss = f"not finite{times}"
        first = f"loss {loss} val {self._held_out}  "
        first += f"lr {row['learning_rate']:.1e}  {_gradient(row)}"
        second = _speed(row, self._steps - step, row["tokens"] / step) + "  "
        second += f"clipped {self._clipped / self._written:.0%} "
        second += f"skipped {row['skip/total']:.0f}  {_branch(row)}{_noise(row)}"
        self._bar.update(self._task, completed=step)
        # Two lines, because one would be wider than most terminals.
        self._live.update(Group(self._bar, Text(f"{first}\n{second}")))
        if not self.console.is_terminal and step % self._log_every == 0:
            self.say(f"{at}{first}  {second}")

    def sample(self, prompt: str, written: str) -> None:
        """Shows the prompt, and the text with which the model continues it."""
        parts = (printable(prompt), "dim"), (printable(written), "bold green")
        self.console.rule("held-out text, and how the model continues it")
        self.console.print(Text.assemble(*parts))
        self.console.rule()
