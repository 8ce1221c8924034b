"""The style of axes: colours, scales, legends, and marks at the edges."""

from pathlib import Path

import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from optax_stability._diagnosis._finding import Finding
from optax_stability._report._drawing import _curves

# The same look is public, as ``plt.style.use("optax_stability.report")``.
_SHEET = Path(__file__).parents[2] / "report.mplstyle"
STYLE = dict(rc_params_from_file(_SHEET, use_default_template=False))
BLUE, ORANGE, INK, GREY = STYLE["axes.prop_cycle"].by_key()["color"]
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST = 1e-100  # smaller values underflow in the arithmetic of axes
_ROUND = [1, 2, 5, 10]  # ticks are multiples of these, times a power of ten
_NEAREST = 0.022  # least distance of two readable numbers, in widths of the axes


def plural(number: int, noun: str) -> str:
    """The noun, in the plural unless ``number`` is 1."""
    return noun if number == 1 else noun + "s"


def short(value: float, *, trim: bool = False) -> str:
    """A number in few characters: 2.00 (or 2), 0.0123, 41,300, 1.2·10⁻⁷."""
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        whole = trim or value == int(value) or abs(value) >= 100
        text = f"{float(f'{value:.3g}'):,.10g}" if whole else f"{value:#.3g}"
        return text.replace("-", "−")
    digits, exponent = f"{value:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    digits = f"{float(digits):g}".replace("-", "−")
    return power if digits == "1" else f"{digits}·{power}"


def _tick(value: float, position: int | None = None) -> str:
    del position
    return short(value, trim=True)


def apply_style(axes: Axes) -> None:
    """Applies what all panels share beside the style, and turns autoscaling off."""
    axes.autoscale(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def add_legend(axes: Axes) -> None:
    """Adds a legend to the right of the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place = {"loc": "upper left", "bbox_to_anchor": (1.015, 1), "borderaxespad": 0}
        axes.legend(handles, labels, **place)


def raise_legend(axes: Axes, *, numbered: bool) -> None:
    """Moves a legend up, to make room for numbers between it and the axes."""
    legend = axes.get_legend()
    if legend is not None:
        legend.borderaxespad = 2.3 if numbered else 0.8


def set_linear_scale(axes: Axes, span: tuple[float, float] | None) -> None:
    """Sets a linear scale around ``span``."""
    low, high = span or (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room if low else 0.0, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _even(axes, y)))


def _even(axes: Axes, value: float) -> str:
    """A tick with as many decimal places as its neighbours need."""
    ticks = axes.yaxis.get_majorticklocs()
    if max(abs(ticks), default=0.0) >= 1e6:
        return short(value, trim=True)
    for places in range(5):
        if np.allclose(ticks, np.round(ticks, places), rtol=0, atol=1e-7):
            return f"{value:,.{places}f}".replace("-", "−")
    return short(value, trim=True)


def set_log_scale(axes: Axes, values: np.ndarray) -> None:
    """Sets a log scale around finite values above 0, at least a factor of 4 high."""
    values = _curves.finite(values)
    values = np.log10(values[values > _SMALLEST])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    room = max(0.05 * (high - low), 0.06, 0.3 - (high - low) / 2)
    axes.set_ylim(10 ** (low - room), 10 ** (high + room))
    axes.set_yscale("log")
    decades = high - low
    subs = (1,) if decades > 2.5 else (1, 2, 5) if decades > 0.9 else (1, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_locator(NullLocator())


def mark_at_edge(
    axes: Axes, steps: np.ndarray, flags: np.ndarray, edge: float, style: dict
) -> None:
    """Marks flagged steps at the upper (1) or lower (0) end of the axes."""
    if not flags.any():
        return
    rows = _curves.marker_rows(flags, np.zeros(len(flags)))
    style = {"ls": "", "clip_on": False, "zorder": 5, "ms": 5, "mew": 0} | style
    place = np.full(len(rows), edge)
    axes.plot(steps[rows], place, transform=axes.get_xaxis_transform(), **style)


def mark_nonfinite(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Marks steps with NaN or Inf."""
    flags = _curves.is_nonfinite(values)
    label = f"not finite, {flags.sum():,} {plural(int(flags.sum()), 'step')}"
    mark_at_edge(axes, steps, flags, 1, {"marker": "v", "color": INK, "label": label})


def mark_zeros(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Marks steps at which a norm is 0, which a logarithm cannot show."""
    style = {"marker": "d", "color": INK, "label": "exactly 0"}
    mark_at_edge(axes, steps, values == 0, 0, style)


def mark_off_scale(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Marks steps with values outside the axes."""
    low, high = axes.get_ylim()
    for beyond, edge, marker, word, most in (
        (values > high, 1, "^", "above", np.max),
        (values < low, 0, "v", "below", np.min),
    ):
        if beyond.any():
            extreme = short(float(most(values[beyond])))
            label = f"{word} the axis, at most {extreme}"
            if edge == 0:
                label = label.replace("most", "least")
            style = {"marker": marker, "color": ORANGE, "label": label}
            mark_at_edge(axes, steps, beyond, edge, style)


def draw_findings(axes: Axes, findings: list[Finding], *, labelled: bool) -> None:
    """Draws a numbered line at the first step of each finding, in list order."""
    low, high = axes.get_xlim()
    places: list[tuple[float, list[int]]] = []
    for i, step in sorted(enumerate((f.step for f in findings), 1), key=lambda x: x[1]):
        axes.axvline(step, color=INK, lw=0.8, ls=(0, (1, 2)), zorder=1.5)
        if places and step - places[-1][0] < _NEAREST * (high - low):
            places[-1][1].append(i)
        else:
            places.append((step, [i]))
    for step, numbers in places if labelled else []:
        axes.annotate(
            " ".join(map(str, sorted(numbers))),
            (step, 1),
            (0, 7),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color="white",
            weight="bold",
            fontsize=7,
            bbox={"boxstyle": "round,pad=0.25,rounding_size=0.6", "fc": INK, "lw": 0},
        )
