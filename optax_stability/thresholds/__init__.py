"""What is normal for this stream of numbers? One small object answers.

A :class:`Threshold` watches a stream of float32 scalars (a gradient norm, a loss) and
gives a limit; ``x > limit`` means "not normal". It does not know what is done about it:
``clip_by_threshold`` scales the gradient down, ``skip_spikes`` leaves the step out.

Rules that every threshold here keeps:

* The limit comes from *past* values (where the published rule makes it depend on the
  present one, the docstring says so); only then the present value is learned.
* Until a threshold has seen enough to judge, its limit is infinite.
* A value that is not finite is neither normal nor learned: the state stays as it was.
* State is O(1) or O(window), float32 and int32, with a structure that never changes.
  Every function can be jitted, scanned and vmapped (one stream per leaf or group).

How many values a threshold calls abnormal after its stream has moved to ten or fifty
times the level for good (5 % of noise, every value learned; tested):

===================================  ==========  ==========
threshold                            ×10         ×50
===================================  ==========  ==========
``zscore()``                         for ever    for ever
``window_zscore()``                  3–5         3–5
``window_quantile(0.9)``             14–29       14–29
``window_median(3.0)``               64          64
``ema_ratio()``                      ~2,200      ~3,800
``detrended_mad(5.0, floor=5.0)``    4–5         9
``relearn(zscore(), after=25)``      25          50
===================================  ==========  ==========

Each function names its paper and every deviation from it.
"""

from optax_stability.thresholds._detrended_mad import (
    DetrendedMadState,
    detrended_mad,
)
from optax_stability.thresholds._ema_ratio import EmaRatioState, ema_ratio
from optax_stability.thresholds._relearn import RelearnState, relearn
from optax_stability.thresholds._threshold import Threshold, constant
from optax_stability.thresholds._windows import (
    WindowState,
    window_median,
    window_quantile,
    window_zscore,
)
from optax_stability.thresholds._zscore import ZScoreState, zscore

__all__ = [
    "DetrendedMadState",
    "EmaRatioState",
    "RelearnState",
    "Threshold",
    "WindowState",
    "ZScoreState",
    "constant",
    "detrended_mad",
    "ema_ratio",
    "relearn",
    "window_median",
    "window_quantile",
    "window_zscore",
    "zscore",
]
