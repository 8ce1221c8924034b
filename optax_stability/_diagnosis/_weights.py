"""Weights that grow without bound."""

import numpy as np

from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._advice import finding
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History
from optax_stability._diagnosis._windows import smooth


def growing_spectral_norm(history: History) -> Finding | None:
    """A singular value whose growth accelerates, which bounded updates cannot cause.

    **Rule**: let d₁, d₂, d₃ be the growth in the three thirds of the time after the
    warm-up, and c = ``GROWTH_PER_THIRD``. Then d₃ ≥ c·max(d₂, c·d₁), and the value has
    grown by the factor ``GROWTH_TOTAL`` in total.
    """
    layers = history.layers("params/spectral_norm")
    keys, names = layers.keys, layers.names
    if not keys:
        whole = history.find_all("params/spectral_norm")
        keys, names = [each.key for each in whole], [""] * len(whole)
    found = []
    for key, name in zip(keys, names, strict=True):
        growth = _accelerating_growth(history, key)
        found += [(*growth, key, name)] if growth else []
    if not found:
        return None
    row, factor, start, end, key, name = min(found)
    evidence = (
        f"largest singular value {start:.3g} → {end:.3g}, ×{-factor:.3g} since step "
        f"{history.steps[history.settled_row()]}, faster in each third of this time, "
        f"limit ×{limits.GROWTH_TOTAL:.0f}; {len(found)} of {len(keys)} matrices"
    )
    return finding("growing_spectral_norm", history, row, key, name or None, evidence)


def _accelerating_growth(
    history: History, key: str
) -> tuple[int, float, float, float] | None:
    """(first row above linear growth, −factor, start, end), if growth accelerates."""
    values, start = history.columns[key], history.settled_row()
    rows = np.flatnonzero(
        history.measured(key, "params/spectral_norm") & np.isfinite(values)
    )
    rows = rows[rows >= start]
    if len(rows) < limits.GROWTH_MEASUREMENTS:
        return None
    steps, level = history.steps[rows], smooth(values[rows])
    thirds = np.linspace(steps[0], steps[-1], 4)
    first, second, third = np.diff(np.interp(thirds, steps, level))
    faster = third >= limits.GROWTH_PER_THIRD * max(
        second, limits.GROWTH_PER_THIRD * first
    )
    factor = level[-1] / level[0] if level[0] > 0 else 0.0
    if not faster or factor < limits.GROWTH_TOTAL:
        return None
    line = level[0] + max(first, 0.0) * 3 * (steps - steps[0]) / (steps[-1] - steps[0])
    off = np.flatnonzero(values[rows] > 2 * line)
    row = rows[off[0]] if len(off) else rows[-1]
    return int(row), -float(factor), float(level[0]), float(level[-1])
