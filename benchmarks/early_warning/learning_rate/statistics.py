"""Numbers that may tell, soon after the warm-up, that a rate is too high."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from early_warning.settings import Setting
from early_warning.trace import Trace

# Steps that a median is of: those of the rule as it was found, not to be changed here.
WINDOW = 10


def median_after(series: np.ndarray, start: int, window: int = WINDOW) -> np.ndarray:
    """Median over ``window`` steps from ``start`` on; steps are the last axis."""
    return np.median(series[..., start : start + window], axis=-1)


def independent(b1: float) -> float:
    """c, the mean square of the update for independent gradients, in the long run."""
    return (1 - b1) / (1 + b1)


def correlation(mean_square: np.ndarray, b1: float) -> np.ndarray:
    """ρ̂ from the mean square of the update, in the long run."""
    c = independent(b1)
    return (mean_square - c) / (b1 * (mean_square + c))


class Statistic(NamedTuple):
    """A number that may tell that a rate is too high.

    Attributes:
      of: (trace, setting, rates as a column) to a number for each run.
      low: whether low is suspicious, not high.
    """

    of: Callable[[Trace, Setting, np.ndarray], np.ndarray]
    low: bool = True


def rho_of_layers(trace: Trace, setting: Setting) -> np.ndarray:
    """Median ρ̂ after the warm-up of each leaf, [..., leaves]."""
    return median_after(np.moveaxis(trace.rho_leaf, -1, -2), setting.warmup)


def rho_without_lag(trace: Trace, setting: Setting) -> np.ndarray:
    """ρ̂ as if v̂ were the mean square of the gradients of the same ten steps.

    v remembers the larger gradients of the early descent, which makes R, and with it
    ρ̂, too small.
    """
    mean_square = median_after(np.square(trace.update_rms), setting.warmup)
    gradients = trace.freshness[..., setting.warmup :][..., :WINDOW].mean(axis=-1)
    return correlation(mean_square / gradients, setting.b1)


def growth(trace: Trace, setting: Setting) -> np.ndarray:
    """Gradient norm in the ten steps after the warm-up by that in the ten before."""
    start = setting.warmup
    before = median_after(trace.norm, max(start - WINDOW, 0), min(start, WINDOW))
    return median_after(trace.norm, start) / before


RHO, RHO_LATER = "ρ̂, the rule", "ρ̂, not before step 30"
STATISTICS = {
    RHO: Statistic(lambda x, s, r: median_after(x.rho, s.warmup)),
    RHO_LATER: Statistic(lambda x, s, r: median_after(x.rho, max(s.warmup, 30))),
    "ρ̂, not before step 60": Statistic(
        lambda x, s, r: median_after(x.rho, max(s.warmup, 60))
    ),
    "R/c, of independent gradients 1": Statistic(
        lambda x, s, r: (
            median_after(np.square(x.update_rms), s.warmup) / independent(s.b1)
        )
    ),
    "ρ̂, lowest layer": Statistic(lambda x, s, r: rho_of_layers(x, s).min(-1)),
    "ρ̂, median layer": Statistic(lambda x, s, r: np.median(rho_of_layers(x, s), -1)),
    "ρ̂, highest layer": Statistic(lambda x, s, r: rho_of_layers(x, s).max(-1)),
    "ρ̂, without the lag of v": Statistic(lambda x, s, r: rho_without_lag(x, s)),
    "cosine of successive gradients": Statistic(
        lambda x, s, r: median_after(x.cosine, s.warmup)
    ),
    "update / parameters": Statistic(
        lambda x, s, r: median_after(x.param_ratio, s.warmup), low=False
    ),
    "gradient norm, after / before": Statistic(lambda x, s, r: growth(x, s), low=False),
    "control: the rate itself": Statistic(
        lambda x, s, r: np.broadcast_to(r, x.loss.shape[:-1]), low=False
    ),
}
