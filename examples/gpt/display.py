"""Shows a run on the console while it trains."""

import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text
from writers import Row, Writer


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
