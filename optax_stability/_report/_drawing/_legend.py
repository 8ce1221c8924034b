"""A legend as text and swatches, for a page that lays it out itself."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

_GLYPHS = {"o": "●", "x": "×", "v": "▼", "^": "▲", "d": "◆", "<": "◀"}


class Entry(NamedTuple):
    """One line of a legend.

    Attributes:
      label: its text.
      colour: in hexadecimal.
      glyph: the mark, "" for a line, "■" for an area.
      dashed: whether a line is dashed.
      faint: whether it is drawn thinly.
    """

    label: str
    colour: str
    glyph: str
    dashed: bool
    faint: bool


def _entry(handle: object, label: str) -> Entry:
    """The entry of what matplotlib has drawn."""
    label = label.replace("\n", " ")
    if isinstance(handle, Line2D):
        marker = str(handle.get_marker())
        line = handle.get_linestyle() not in ("None", "", " ")
        glyph = "" if line else _GLYPHS.get(marker, "●")
        dashed = line and handle.is_dashed()
        faint = (handle.get_alpha() or 1.0) < 0.5
        return Entry(label, to_hex(handle.get_color()), glyph, dashed, faint)
    if isinstance(handle, Patch):
        return Entry(label, to_hex(handle.get_facecolor()), "■", False, False)
    colour = getattr(handle, "get_facecolor", lambda: [(0.5, 0.5, 0.5, 1.0)])()[0]
    return Entry(label, to_hex(colour), "■", False, True)


def take(axes: Axes) -> list[Entry]:
    """The entries of the legend of some axes, which lose it."""
    legend = axes.get_legend()
    if legend is None:
        handles, labels = axes.get_legend_handles_labels()
    else:
        handles = legend.legend_handles
        labels = [text.get_text() for text in legend.get_texts()]
        legend.remove()
    return [
        _entry(handle, label) for handle, label in zip(handles, labels, strict=True)
    ]
