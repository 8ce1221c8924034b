"""Heat map of layers × steps: which layer left its usual gradient norm, and when.

*Rule*: each cell is log₁₀ of the norm over the median of its layer. If there are more
steps or layers than pixels, a pixel shows the cell that is furthest from this median;
non-finite values take precedence.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle

from optax_stability._diagnosis._series import History, is_vector
from optax_stability._diagnosis._windows import median
from optax_stability._report._drawing import _axes, _curves

_COLUMNS, _ROWS, _LABELS = 720, 360, 40
# Of more layers, several share a row, and have no text of their own.
_HOVERED = _ROWS
# The colours range from ÷100 to ×100, in steps of an eighth of a decade.
_DECADES, _SHADES = 2.0, 33
_NONFINITE = (0.0, 0.0, 0.0)
# Low values are lighter than high ones, so that dark means large in grey print.
_COLOURS = LinearSegmentedColormap.from_list(
    "relative",
    [
        (0.00, "#3f93d1"),
        (0.25, "#9ccbea"),
        (0.42, "#f3f5f6"),
        (0.58, "#f3f5f6"),
        (0.72, "#f2a65a"),
        (0.85, "#c4560c"),
        (1.00, "#772403"),
    ],
    N=_SHADES,
)


class Cells(NamedTuple):
    """A heat map.

    Attributes:
      names: names of the rows; if layers share a row, the name of the first.
      level: float64[n, m] – log₁₀ of the ratio to the layer's median; NaN if unknown.
      nonfinite: bool[n, m] – whether the cell contains a non-finite value.
      edges: (first, last) step.
    """

    names: list[str]
    level: np.ndarray
    nonfinite: np.ndarray
    edges: tuple[float, float]


def furthest(values: np.ndarray, starts: np.ndarray, axis: int) -> np.ndarray:
    """The value furthest from 0 in each group; NaN if all are NaN."""
    known = ~np.isnan(values)
    high = np.maximum.reduceat(np.where(known, values, -np.inf), starts, axis=axis)
    low = np.minimum.reduceat(np.where(known, values, np.inf), starts, axis=axis)
    far = np.where(high >= -low, high, low)
    return np.where(np.logical_or.reduceat(known, starts, axis=axis), far, np.nan)


def relative(norms: np.ndarray) -> np.ndarray:
    """log₁₀(norm/median of its layer) of ``norms[T, n]``; clipped to two decades."""
    own = median(np.where((norms > 0) & np.isfinite(norms), norms, np.nan))
    with np.errstate(all="ignore"):
        level = np.log10(norms) - np.log10(own)
    return np.clip(level, -_DECADES, _DECADES)


def _measured_rows(history: History, norms: np.ndarray) -> np.ndarray:
    """bool[T]: rows in which the layers were measured, or the norm is non-finite."""
    missing = np.isnan(norms).all(axis=1)
    whole = _curves.norm_of(history)
    if whole is None:
        return ~missing | _curves.is_nonfinite(norms[:, 0])
    return ~missing | _curves.is_nonfinite(whole)


def cells(history: History) -> Cells | None:
    """The heat map of the gradient norms; None if no layer was measured."""
    if not has_layers(history):
        return None
    layers = history.layers("grad/norm", "clip/norm")
    order = np.argsort(history.columns["step"], kind="stable")
    rows = order[_measured_rows(history, layers.values)[order]]
    steps, norms = history.columns["step"][rows], layers.values[rows]
    groups = np.unique(np.linspace(0, len(layers.names), _ROWS + 1).astype(int)[:-1])
    level = furthest(relative(norms), groups, axis=1)
    bad = ~np.isfinite(norms) & ~np.isnan(norms).all(axis=0)
    bad = np.logical_or.reduceat(bad, groups, axis=1)
    at, edges = _columns(steps)
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    level = furthest(level, starts, axis=0)
    bad = np.logical_or.reduceat(bad, starts, axis=0)
    picked = _shown_groups(at[starts])
    names = [layers.names[group] for group in groups]
    blank = (picked < 0)[:, None]
    return Cells(
        names,
        np.where(blank, np.nan, level[picked]).T,
        np.where(blank, False, bad[picked]).T,
        edges,
    )


def _columns(steps: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The column of each row, and the outer edges; all columns span equal steps."""
    first, last = float(np.nanmin(steps)), float(np.nanmax(steps))
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    gap = gap if gap > 0 else 1.0
    edges = (first - gap / 2, last + gap / 2)
    number = max(1, min(_COLUMNS, round((last - first) / gap) + 1))
    at = (steps - edges[0]) / (edges[1] - edges[0]) * number
    return np.clip(at, 0, number - 1).astype(int), edges


def _shown_groups(taken: np.ndarray) -> np.ndarray:
    """The group shown in each column: its own, or the previous column's; else −1."""
    number = int(taken[-1]) + 1
    own = np.full(number, -1)
    own[taken] = np.arange(len(taken))
    last = np.maximum.accumulate(own)
    recent = np.arange(number) - taken[np.maximum(last, 0)] <= 1
    return np.where(recent, last, -1)


def _shorten(name: str, most: int = 34) -> str:
    """The name; if it is too long, without whole parts in the middle, or cut there.

    What is no Unicode is replaced: it cannot be drawn.
    """
    name = name.encode("utf-8", "replace").decode()
    if len(name) <= most:
        return name
    first, *middle = name.split("/")
    for start in range(1, len(middle)):
        shorter = "/".join([first, "…", *middle[start:]])
        if len(shorter) <= most:
            return shorter
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def has_layers(history: History) -> bool:
    """Whether the gradient norm of any layer was measured."""
    values = history.layers("grad/norm", "clip/norm").values
    return values.size > 0 and not np.isnan(values).all()


def height(history: History) -> float:
    """Height in inches, by the number of layers."""
    number = len(history.layers("grad/norm", "clip/norm").names)
    return float(np.clip(0.115 * number, 0.9, 5.0))


def draw(axes: Axes, history: History) -> None:
    """Draws the heat map, with the first layer on top."""
    found = cells(history)
    if found is None:
        return
    shade = (np.nan_to_num(found.level) + _DECADES) / (2 * _DECADES)
    picture = _COLOURS(shade, bytes=True)
    picture[np.isnan(found.level)] = 0
    picture[found.nonfinite] = (*_NONFINITE, 255)
    number, width = found.level.shape
    axes.grid(visible=False)
    axes.set_ylim(number - 0.5, -0.5)
    axes.imshow(
        picture,
        extent=(*found.edges, number - 0.5, -0.5),
        aspect="auto",
        interpolation="none",
    )
    _add_hover_rows(axes, found)
    rows = _labelled_rows(found.names)
    names = [_shorten(found.names[row]) for row in rows]
    axes.set_yticks(rows, names, fontsize=6.5 if number > 12 else 7.5, parse_math=False)
    axes.yaxis.tick_right()
    axes.tick_params(axis="y", length=0, pad=5)
    ends = np.linspace(*found.edges, width + 1)
    middles = (ends[:-1] + ends[1:]) / 2
    style = {"marker": "v", "color": _NONFINITE}
    flags = np.asarray(found.nonfinite.any(axis=0))
    _axes.mark_at_edge(axes, middles, flags, 1, style)
    _add_legend(axes, bool(found.nonfinite.any()))


def _labelled_rows(names: list[str]) -> np.ndarray:
    """Rows with a name beside them: of too many, kernels before biases and scales."""
    rows = np.arange(len(names))
    if len(rows) <= _LABELS:
        return rows
    kernels = np.array([row for row in rows if not is_vector(names[row])], int)
    rows = kernels if len(kernels) else rows
    return rows[:: -(-len(rows) // _LABELS)]


def _add_hover_rows(axes: Axes, found: Cells) -> None:
    """An invisible area over each row, which the page gives a text."""
    if len(found.names) > _HOVERED:
        return
    first, last = found.edges
    for i in range(len(found.names)):
        area = Rectangle((first, i - 0.5), last - first, 1, alpha=0, gid=f"hover-{i}")
        axes.add_patch(area)


def hover_texts(history: History) -> list[str]:
    """Of each row of the map: usual, smallest and largest norm, and what broke when."""
    layers, steps = history.layers("grad/norm", "clip/norm"), history.columns["step"]
    if not has_layers(history) or len(layers.names) > _HOVERED:
        return []
    return [
        _hover_text(name, steps, values)
        for name, values in zip(layers.names, layers.values.T, strict=True)
    ]


def _hover_text(name: str, steps: np.ndarray, values: np.ndarray) -> str:
    known = np.flatnonzero(np.isfinite(values))
    text = name
    if len(known):
        low, high = known[[values[known].argmin(), values[known].argmax()]]
        usual = _axes.short(float(median(values[known])))
        text += (
            f": median {usual}, smallest {_axes.short(float(values[low]))} at step "
            f"{steps[low]:,.0f}, largest {_axes.short(float(values[high]))} at step "
            f"{steps[high]:,.0f}"
        )
    broken = np.flatnonzero(_curves.is_nonfinite(values))
    if len(broken):
        rows = _axes.plural(len(broken), "row")
        text += (
            f"; not finite in {len(broken):,} {rows} from step {steps[broken[0]]:,.0f}"
        )
    return text


def _add_legend(axes: Axes, nonfinite: bool) -> None:
    """Adds a row of colour swatches above the map, from small to large."""
    texts = "÷100 and below", "÷10", "median of the layer", "×10", "×100 and above"
    swatches = [
        Patch(facecolor=_COLOURS(i / 4), edgecolor="#8a949e", lw=0.4, label=text)
        for i, text in enumerate(texts)
    ]
    if nonfinite:
        swatches.append(
            Patch(facecolor=_NONFINITE, edgecolor=_NONFINITE, label="not finite (▼)")
        )
    axes.legend(
        handles=swatches,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(swatches),
    )
