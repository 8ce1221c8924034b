"""Places panels on a figure, with the same steps and margins."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from optax_stability._diagnosis._finding import Finding
from optax_stability._report._drawing import _axes, _legend
from optax_stability._report._drawing._curves import Run
from optax_stability._report._drawing._panels import Panel

_WIDTH, _LEFT, _RIGHT = 10.0, 0.72, 2.15
# Without a legend beside the axes, and without names of layers.
_NARROW = 0.15
_TITLE, _NUMBERS, _BETWEEN, _BOTTOM = 0.22, 0.24, 0.14, 0.42


def _span(run: Run) -> tuple[float, float]:
    """The range of steps on the axes."""
    steps = np.concatenate([run.train.columns["step"], run.held_out_steps])
    steps = steps[np.isfinite(steps)]
    first, last = (steps.min(), steps.max()) if len(steps) else (0.0, 1.0)
    room = 0.01 * (last - first) or 1.0
    return float(first - room), float(last + room)


def _blank() -> Figure:
    """A figure without panels, with a message."""
    figure = Figure((_WIDTH, 1.2))
    figure.text(
        0.03, 0.5, "None of the metrics that can be plotted was recorded.", va="center"
    )
    return figure


def compose(
    run: Run, panels: Sequence[Panel], findings: list[Finding], *, titled: bool
) -> tuple[Figure, list[_legend.Entry]]:
    """One figure with all panels; the numbers of findings are above the first.

    Without titles the legends are left to the page, and returned.
    """
    if not panels:
        return _blank(), []
    entries: list[_legend.Entry] = []
    head = [each.head if titled else 0.0 for each in panels]
    above = [each + (_TITLE + 0.13 if titled else 0.1) for each in head]
    above[0] += _NUMBERS if findings else 0.0
    heights = [each.height(run) for each in panels]
    total = sum(above) + sum(heights) + _BETWEEN * (len(panels) - 1) + _BOTTOM
    figure = Figure((_WIDTH, total))
    top = total
    for i, panel in enumerate(panels):
        top -= above[i]
        right = _RIGHT if titled or panel.names_beside else _NARROW
        axes = figure.add_axes(
            (
                _LEFT / _WIDTH,
                (top - heights[i]) / total,
                (_WIDTH - _LEFT - right) / _WIDTH,
                heights[i] / total,
            )
        )
        _axes.apply_style(axes)
        panel.draw(axes, run)
        axes.set_xlim(_span(run))
        if not titled:
            entries += _legend.take(axes)
        elif axes.get_legend() is None:
            _axes.add_legend(axes)
        else:
            _axes.raise_legend(axes, numbered=bool(findings) and i == 0)
        _axes.draw_findings(axes, findings, labelled=i == 0)
        if titled:
            lift = top + above[i] - _TITLE
            style: dict[str, Any] = {"weight": "bold", "fontsize": 10}
            figure.text(0.1 / _WIDTH, lift / total, panel.title, **style)
        if i < len(panels) - 1:
            axes.tick_params(axis="x", labelbottom=False)
        else:
            axes.set_xlabel("step")
        top -= heights[i] + _BETWEEN
    return figure, entries


class Picture(NamedTuple):
    """A rendered figure, and its legend.

    Attributes:
      content: content of a file.
      legend: the legends that were left to the page, with last values and counts.
    """

    content: bytes
    legend: list[_legend.Entry]


def render(
    run: Run,
    panels: Sequence[Panel],
    findings: list[Finding],
    kind: str,
    *,
    titled: bool = True,
    salt: str = "optax_stability",
) -> Picture:
    """Renders panels in a format of matplotlib, independent of its global settings.

    Args:
      run: the history to draw.
      panels: the panels, from top to bottom.
      findings: the findings, numbered from 1.
      kind: ``"png"``, ``"svg"`` or ``"pdf"``.
      titled: whether panels have a title.
      salt: makes the ids in an SVG differ from those in another SVG of the same page.

    Returns:
      The content of a file, and its legend if it has no titles.
    """
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    style = _axes.STYLE | {"svg.hashsalt": salt}
    with matplotlib.style.context(["default", style]):
        figure, legend = compose(run, panels, findings, titled=titled)
        file = io.BytesIO()
        transparent = kind == "svg" and not titled
        options = {"transparent": transparent, "metadata": dates.get(kind)}
        figure.savefig(file, format=kind, dpi=150, **options)
        return Picture(file.getvalue(), legend)
