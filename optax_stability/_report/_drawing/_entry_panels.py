"""Panels of metrics that have many entries: a number for each head, expert or the like.

The highest and the lowest entry are drawn; a single number is one curve.
"""

import functools
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from optax_stability._diagnosis import _limits
from optax_stability._diagnosis._series import History
from optax_stability._report._drawing import _axes, _curve_panels, _curves
from optax_stability._report._drawing._axes import BLUE, GREY, INK
from optax_stability._report._drawing._curves import Run

EXTRA = "extra/"
MEASURED, BOUND = "extra/attention_logits", "attention/logit_bound"
# The attention logits by their names, and the level of the finding for each.
LEVELS = {MEASURED: _limits.ATTENTION_LOGIT, BOUND: _limits.LOGIT_BOUND}
# From the largest to the smallest: above this ratio the scale is logarithmic.
_WIDE = 30.0


def extras(history: History) -> list[str]:
    """The names of the extras of :func:`record_extra`, but for attention logits."""
    keys = [key for key in history.columns if key.startswith(EXTRA)]
    names = dict.fromkeys("/".join(key.split("/")[:2]) for key in keys)
    return [name for name in names if name != MEASURED and curves_of(history, name)]


def curves_of(history: History, name: str) -> dict[str, np.ndarray]:
    """The curve of a single number, or the highest and the lowest of all entries.

    Empty if nothing was measured.
    """
    entries = history.layers(name).values
    if not np.isnan(entries).all():
        measured = _curves.finite(entries)
        return {
            "highest": np.fmax.reduce(measured, axis=1),
            "lowest": np.fmin.reduce(measured, axis=1),
        }
    single = _curves.column(history, name)
    return {} if single is None else {"value": single}


def draw_attention(axes: Axes, run: Run) -> None:
    """Draws the attention logits, or their bound, and the level of the finding."""
    name = next((name for name in LEVELS if curves_of(run.train, name)), BOUND)
    _draw(axes, run, name, LEVELS[name])


def drawer(name: str) -> Callable[[Axes, Run], None]:
    """What draws the entries of this metric."""
    return functools.partial(_draw, name=name)


def _draw(axes: Axes, run: Run, name: str, level: float | None = None) -> None:
    curves = curves_of(run.train, name)
    looks = {"highest": (BLUE, 1.3), "lowest": (GREY, 1.0), "value": (BLUE, 1.3)}
    for label, values in curves.items():
        color, width = looks[label]
        known = values[np.isfinite(values)]
        last = f", last {_axes.short(known[-1])}" if len(known) else ""
        _curve_panels.draw_curve(
            axes, run, values, color=color, lw=width, label=f"{label}{last}"
        )
    drawn = _curves.finite(np.concatenate([*curves.values(), []]))
    if level is not None:
        axes.axhline(level, color=INK, lw=0.9, ls=(0, (4, 2)), label=f"level {level:g}")
        drawn = np.append(drawn, level)
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return
    if known.min() > 0 and known.max() > _WIDE * known.min():
        _axes.set_log_scale(axes, known)
    else:
        _axes.set_linear_scale(axes, (float(known.min()), float(known.max())))
    for values in curves.values():
        _axes.mark_nonfinite(axes, run.train.columns["step"], values)
