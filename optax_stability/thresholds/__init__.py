"""Adaptive limits for streams of numbers, such as gradient norms and losses.

A :class:`Threshold` observes a stream of scalars (a gradient norm, a loss) and
returns a limit; ``x > limit`` means that x is abnormal. The caller decides what to do:
``clip_by_threshold`` scales the gradient down, ``skip_spikes`` skips the step.

All thresholds follow these rules:

* The limit is computed from *past* values, before the present value is learned. If the
  published rule also uses the present value, the docstring says so.
* Until a threshold has learned enough values, its limit is infinite, or far above what
  it will be (``detrended_mad``; ``zscore`` for a spike).
* A value that is not finite is abnormal and is not learned: the state is unchanged.
* State is O(1) or O(window), float32 and int32, with a structure that never changes.
  If all its floats are cast to float64, the threshold computes in float64.
  Every function can be jitted, scanned and vmapped (one stream per leaf or group).

The number of values that a threshold finds abnormal after a lasting rise of its stream
to ten or fifty times the level (noise of 5 %, every value is learned; tested):

===================================  ==========  ==========
threshold                            ×10         ×50
===================================  ==========  ==========
``zscore()``                         unbounded   unbounded
``window_zscore()``                  3–5         3–5
``window_quantile(0.9)``             14–29       14–29
``window_median(3.0)``               64          64
``ema_ratio()``                      ~2,200      ~3,800
``detrended_mad(5.0, floor=5.0)``    4–5         9
``relearn(zscore(), after=25)``      25          50
===================================  ==========  ==========

A spike before a threshold is armed must not make it blind afterwards. Here one value of
10,000 times the level is the first, fourth, eleventh or 25th of a stream with noise of
10 %, and a second one of 100 times the level comes at any of the hundred values after
the threshold is armed. The limit that it meets, at most, in multiples of the level
(100.0: it passes; tested):

===================================  =======  =======  =======  =======  =======
threshold                            none     1st      4th      11th     25th
===================================  =======  =======  =======  =======  =======
``zscore()``                         1.0      9.9      1.6      1.6      1.5
``zscore(published=True)``           1.0      100.0    100.0    100.0    100.0
``window_zscore()``                  1.6      8.0      8.0      8.0      8.0
``window_zscore(published=True)``    1.6      100.0    100.0    100.0    100.0
``window_quantile(0.9)``             1.1      1.2      1.2      1.2      1.2
``window_median(3.0)``               3.1      3.1      3.1      3.1      3.1
``ema_ratio()``                      0.9      0.9      0.9      0.9      0.9
``detrended_mad(5.0, floor=5.0)``    5.7      5.7      5.7      5.7      5.7
``relearn(zscore(), after=25)``      1.0      9.9      1.6      1.6      1.5
===================================  =======  =======  =======  =======  =======

Each docstring cites the paper and lists every deviation from it.

May import: ``_core``.
"""

from optax_stability.thresholds._at_most_median import (
    AtMostMedianState,
    at_most_median,
)
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
    "AtMostMedianState",
    "DetrendedMadState",
    "EmaRatioState",
    "RelearnState",
    "Threshold",
    "WindowState",
    "ZScoreState",
    "at_most_median",
    "constant",
    "detrended_mad",
    "ema_ratio",
    "relearn",
    "window_median",
    "window_quantile",
    "window_zscore",
    "zscore",
]
