"""Shows a run on the console while it trains."""

import math
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress
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


def _branch(row: Row) -> str:
    """How long a branch has been open, and how many were taken back, if any was."""
    length, back = row.get("branch/length", 0), row.get("branch/rollbacks", 0)
    is_open = f"branch {length:.0f}  " if length else ""
    return is_open + (f"taken back {back:.0f}  " if back else "")


def _noise(row: Row) -> str:
    """The noise scale with its interval, or what is known of it."""
    nan = math.nan  # Plain optax does not measure it.
    scale, low = row.get("noise_scale/b_simple", nan), row.get("noise_scale/low", nan)
    if math.isfinite(scale):
        return f"noise {count(scale)} ({count(low)}–{count(row['noise_scale/high'])})"
    return f"noise ≥ {count(low)}" if low > 0 else "noise –"


def _held_out(row: Row, unit: str) -> tuple[str, str]:
    """Bits per byte where that is known, and else per token; and which."""
    if "eval/bits_per_byte" in row:
        return f"{row['eval/bits_per_byte']:.3f}", "byte"
    return _or_dash(row.get("eval/bits", math.nan), ".3f"), unit


def _gradient(row: Row) -> str:
    """The norm as it came and as it was clipped, and the limit in between."""
    norm, limit = row["grad/norm"], row["clip/limit"]
    clipped = min(norm, limit) if math.isfinite(norm) else norm
    return f"grad {_or_dash(norm)} → {_or_dash(clipped)} limit {_or_dash(limit)}"


def _speed(row: Row, steps_left: int, tokens_per_step: float) -> str:
    """Tokens per second, what share of the device that is, and the time left."""
    if "perf/tokens_per_second" not in row:
        return "– tok/s  eta –"
    speed = row["perf/tokens_per_second"]
    use = f" mfu {row['perf/mfu']:.0%}" if "perf/mfu" in row else ""
    eta = timedelta(seconds=round(steps_left * tokens_per_step / speed))
    return f"{count(speed)} tok/s{use}  eta {eta}"


def _printable(text: str) -> str:
    """The text without characters that could steer the terminal."""
    keep = [c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4)]
    return "".join(keep)


class Screen(Writer):
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
          steps: where the run ends.
          log_every: steps between log lines.
          unit: what a token is.
          before: ``step`` and ``eval/…`` of the run that goes on, if one does.
          quiet: shows nothing, as where another process does.
        """
        self.console = Console(
            highlight=False, markup=False, soft_wrap=True, quiet=quiet
        )
        self._steps, self._log_every, self._unit = steps, log_every, unit
        self._written = self._clipped = 0
        self._loss, self._held_out = math.nan, _held_out(before or {}, unit)[0]
        done = int(before["step"]) if before else 0
        bar = BarColumn(None, table_column=Column(ratio=1))  # takes what room is left
        self._bar = Progress(MofNCompleteColumn(), bar, expand=True)
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._live = Live(Group(self._bar, Text("compiling …")), console=self.console)
        if self.console.is_terminal and not quiet:
            self._live.start()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints above the live lines."""
        self.console.print(Text(text, style))

    def write(self, step: int, row: Row) -> None:
        """Shows a step of training, or what the held-out part says."""
        at = f"step {step:>{len(str(self._steps))}}  "
        if "eval/loss" in row:
            self._evaluated(at, row)
        elif "rewind/to" in row:
            to = f"back to step {row['rewind/to']:.0f}, and on with other batches"
            self.say(f"{at}the loss has run away: {to}", "bold red")
        else:
            self._trained(at, step, row)

    def _evaluated(self, at: str, row: Row) -> None:
        self._held_out, unit = _held_out(row, self._unit)
        text = f"held-out loss {row['eval/loss']:.3f} = {self._held_out} bits/{unit}"
        self.say(f"{at}{text}  after {count(row['tokens'])} {self._unit}s", "bold")

    def _trained(self, at: str, step: int, row: Row) -> None:
        # An average, for single losses jump; of those that are numbers, and of the
        # parameters in use.
        if math.isfinite(row["loss"]) and not row.get("branch/probed"):
            old = self._loss if math.isfinite(self._loss) else row["loss"]
            self._loss = 0.9 * old + 0.1 * row["loss"]
        self._written += 1
        self._clipped += (
            row["grad/norm"] > row["clip/limit"] and not row["skip/skipped"]
        )
        learns = f"loss {_or_dash(self._loss, '.3f')} val {self._held_out}  "
        learns += f"lr {row['learning_rate']:.1e}  {_gradient(row)}"
        fares = f"clipped {self._clipped / self._written:.0%} "
        fares += f"skipped {row['skip/total']:.0f}  {_branch(row)}{_noise(row)}  "
        fares += _speed(row, self._steps - step, row["tokens"] / step)
        self._bar.update(self._task, completed=step)
        # Two lines, for one is wider than most terminals.
        self._live.update(Group(self._bar, Text(f"{learns}\n{fares}")))
        if not self.console.is_terminal and step % self._log_every == 0:
            self.say(f"{at}{learns}  {fares}")

    def sample(self, prompt: str, written: str) -> None:
        """Shows what the model writes, apart from what it was given."""
        self.say("\n" + " held-out text, and how the model goes on ".center(79, "─"))
        parts = (_printable(prompt), "dim"), (_printable(written), "bold green")
        self.console.print(Text.assemble(*parts))
        self.say("─" * 79)
