"""Series that may rise before a spike."""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from early_warning.trace import Trace

# Steps that the thresholds and z-scores look back.
PAST = 32


def past_of(series: np.ndarray) -> np.ndarray:
    """The ``PAST`` steps before each step from ``PAST`` on."""
    return sliding_window_view(series, PAST, axis=-1)[..., :-1, :]


def z_score(series: np.ndarray) -> np.ndarray:
    """Distance from the median of the past, in its deviations; 0 without a past."""
    past, z = past_of(series), np.zeros_like(series)
    centre = np.median(past, axis=-1)
    scale = 1.4826 * np.median(np.abs(past - centre[..., None]), axis=-1) + 1e-12
    z[..., PAST:] = (series[..., PAST:] - centre) / scale
    return z


def jump(series: np.ndarray) -> np.ndarray:
    """How many times the median of the past; 0 without a past."""
    ratio = np.zeros_like(series)
    ratio[..., PAST:] = series[..., PAST:] / np.median(past_of(series), axis=-1)
    return ratio


def trailing_mean(series: np.ndarray, window: int = 8) -> np.ndarray:
    """Mean of each step and those before it; 0 until there are enough."""
    means = np.zeros_like(series)
    means[..., window - 1 :] = sliding_window_view(series, window, -1).mean(-1)
    return means


JUMP, LOSS = "update rms / its median of 32", "control: the loss, z-score"
# High is suspicious.
PRECURSORS: dict[str, Callable[[Trace], np.ndarray]] = {
    "gradient norm, z-score": lambda x: z_score(np.log(x.norm)),
    "update rms": lambda x: x.update_rms,
    JUMP: lambda x: jump(x.update_rms),
    "ρ̂ high": lambda x: x.rho,
    "ρ̂ low": lambda x: -x.rho,
    "cosine of successive gradients low": lambda x: -trailing_mean(x.cosine),
    "update / parameters": lambda x: x.param_ratio,
    "shallow gradient falls, z-score": lambda x: -z_score(np.log(x.shallow)),
    "Σg²/Σv̂ low": lambda x: -trailing_mean(np.log(x.energy)),
    "Σg²/Σv̂ low, stalest leaf": lambda x: (
        -trailing_mean(np.log(np.maximum(x.stalest, 1e-30)))
    ),
    "bimodality": lambda x: x.bimodality,
    LOSS: lambda x: z_score(x.loss),
}
