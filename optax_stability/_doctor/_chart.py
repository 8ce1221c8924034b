"""Curves as characters, for a terminal."""

import numpy as np

from optax_stability._diagnosis._windows import median

_LEVELS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 6


def chart(name: str, history: dict[str, np.ndarray], key: str, width: int) -> str:
    """A curve in blocks, the extremes of each column kept; empty if nothing is known.

    Norms are drawn as logarithms, and so is a loss that changes by orders.
    """
    values = history.get(key)
    if values is None or not np.isfinite(values).any():
        return ""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    wide = len(positive) == len(finite) and finite.max() / 50 > finite.min()
    log = key == "grad/norm" or wide
    shown = np.where(np.isfinite(values) & (~log | (values > 0)), values, np.nan)
    if not np.isfinite(shown).any():
        return ""
    shown = np.log10(shown) if log else shown
    width = max(min(width - 12, len(shown)), 1)
    parts = np.array_split(shown, width)
    # The value of a column is the one furthest from the median of all.
    centre = float(median(shown))
    column = np.array([_furthest(part, centre) for part in parts])
    low, high = float(np.nanmin(column)), float(np.nanmax(column))
    # Halves: the largest numbers differ by more than the largest number.
    span = high / 2 - low / 2 or 1.0
    scaled = (column / 2 - low / 2) / span * (_HEIGHT * 8 - 1) + 1
    lines = []
    for row in range(_HEIGHT - 1, -1, -1):
        fill = np.clip(np.nan_to_num(scaled, nan=0.0) - 8 * row, 0, 8).astype(int)
        edge = {0: low, _HEIGHT - 1: high}.get(row)
        label = "" if edge is None else f"{10**edge if log else edge:.3g}"
        lines.append(f"{label:>10} ▏" + "".join(_LEVELS[each] for each in fill))
    broken = np.isnan(column)
    if broken.any():
        lines.append(" " * 12 + "".join("×" if each else " " for each in broken))
    scale = " (logarithmic)" if log else ""
    return f"{name}{scale}\n" + "\n".join(line.rstrip() for line in lines) + "\n"


def _furthest(part: np.ndarray, centre: float) -> float:
    known = part[np.isfinite(part)]
    far = np.abs(known / 2 - centre / 2)
    return known[np.argmax(far)] if len(known) else np.nan
