"""An examination as text for a terminal."""

import shutil
import textwrap
from collections.abc import Iterable

import numpy as np

from optax_stability._diagnosis._finding import Finding
from optax_stability._doctor import _trainers
from optax_stability._doctor._examination import Examination
from optax_stability._doctor._log import Log
from optax_stability._report._page import title_of

_BOLD, _DIM, _ALERT, _CALM, _END = (
    "\x1b[1m",
    "\x1b[2m",
    "\x1b[33m",
    "\x1b[32m",
    "\x1b[0m",
)
_LABEL = 11


class Style:
    """Width and colours of a terminal.

    Attributes:
      width: columns to fill.
      colour: whether text may be coloured.
    """

    def __init__(self, colour: bool, width: int | None = None):
        """By default as wide as the terminal, at most 100."""
        self.colour = colour
        self.width = width or min(shutil.get_terminal_size((88, 24)).columns, 100)

    def mark(self, text: str, code: str) -> str:
        """The text in a colour, where there are colours."""
        return f"{code}{text}{_END}" if self.colour else text

    def item(self, label: str, text: str, bullet: str = "") -> str:
        """A label, and a text that is indented behind it."""
        indent = " " * (3 + _LABEL + len(bullet))
        wrapped = textwrap.fill(
            text,
            max(self.width, 40),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ).lstrip()
        label = self.mark(label.ljust(_LABEL), _DIM) if label else " " * _LABEL
        return f"   {label}{bullet}{wrapped}"

    def items(self, label: str, texts: Iterable[str]) -> list[str]:
        """One label for several texts."""
        lines = []
        for i, text in enumerate(texts):
            lines.append(self.item("" if i else label, text, "· "))
        return lines


def _head(examined: Examination, style: Style) -> list[str]:
    log = examined.log
    steps, rows = log.history["step"], len(log.history["step"])
    what = f"{rows:,} rows, steps {steps[0]:,.0f} to {steps[-1]:,.0f}"
    lines = [style.mark(log.name, _BOLD)]
    lines.append(style.item("log", f"{log.trainer}, {what}" if log.trainer else what))
    named = ", ".join(f"{ours} = {theirs}" for ours, theirs in log.columns.items())
    lines.append(style.item("columns", named))
    loss = log.history.get("loss")
    known = np.zeros(0) if loss is None else loss[np.isfinite(loss)]
    if len(known):
        score = examined.spike_score or 0.0
        lines.append(
            style.item(
                "loss",
                f"{known[0]:.4g} first, {known[-1]:.4g} last, {known.min():.4g} "
                f"lowest; spike score {score:.2%} (losses above 6 moving σ)",
            )
        )
    return lines


def _finding(number: int, each: Finding, trainer: str, style: Style) -> list[str]:
    where = f", first in {each.layer}" if each.layer else ""
    title = style.mark(f"{number}. {title_of(each.kind)}", _BOLD + _ALERT)
    lines = ["", f"{title}  {style.mark(each.kind, _DIM)}"]
    lines.append(
        style.item("since", f"step {each.step:,}{where}, seen in {each.metric}")
    )
    lines.append(style.item("evidence", each.evidence))
    lines += style.items("likely", each.causes)
    if not _trainers.is_ours(trainer):
        lines += style.items("do", each.elsewhere)
    lines += style.items("with optax", each.remedies)
    lines.append(style.item("more", f"docs/findings/{each.kind}.md"))
    return lines


def _checks(examined: Examination, style: Style) -> list[str]:
    ran = [each.kind for each in examined.checks if not each.lacks]
    lacking: dict[str, list[str]] = {}
    for each in examined.checks:
        if each.lacks:
            lacking.setdefault(each.lacks, []).append(each.kind)
    lines = ["", style.mark(f"{len(ran)} checks ran", _BOLD)]
    lines.append(style.item("", ", ".join(ran)))
    if lacking:
        count = len(examined.checks) - len(ran)
        lines += ["", style.mark(f"{count} checks could not run, for lack of", _BOLD)]
        lines += style.items(
            "", (f"{what}: {', '.join(kinds)}" for what, kinds in lacking.items())
        )
    if examined.unknown:
        lines += ["", style.mark("Cannot be told from this log", _BOLD)]
        lines += style.items("", examined.unknown)
    return lines


def show_finding(finding: Finding, log: Log, style: Style) -> str:
    """One new finding of a log, with a line break at its end."""
    title = style.mark(f"{log.name}, step {log.history['step'][-1]:,.0f}", _BOLD)
    lines = [title, *_finding(1, finding, log.trainer, style)[1:]]
    return "\n".join(lines) + "\n\n"


def show(examined: Examination, style: Style) -> str:
    """The whole text, with a line break at its end."""
    lines = _head(examined, style)
    if examined.partings:
        lines += style.items("against", map(str, examined.partings))
    if not examined.findings:
        lines += ["", style.mark("Nothing found.", _BOLD + _CALM)]
    for i, each in enumerate(examined.findings, 1):
        lines += _finding(i, each, examined.log.trainer, style)
    lines += _checks(examined, style)
    return "\n".join(lines) + "\n"
