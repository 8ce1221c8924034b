"""The noise scale of now, where it changes while it is measured.

*Problem*: an average over many steps is precise and describes the past. In the first
steps of a run ‖G‖² falls by a factor of 50 within 30 steps; old and large values then
outvote the new ones for hundreds of steps. An average over few steps knows little. How
fast the noise scale changes is not known either, and changes along the run.

*Rule*: the ratio ρ = ‖G‖²/tr Σ = 1/B_simple is followed under four hypotheses: it is
constant, or it changes by about ``_RATES`` of itself over 1/(1 − decay) steps. Each
predicts the next G² from the past. The probability of a hypothesis grows with the
likelihood of what it predicted. G² is taken relative to the trace of now, which makes
its variance nearly independent of the step::

  y   = G²/(mean S of the last steps)     E y = ρ
  h   = K/N² + 2(K − 1)·ρ/N               Var y = θ·h, for Gaussian noise in all
                                          directions alike, θ the variance of S/tr Σ

θ is learned from the errors of the predictions, so that other noise changes the unit
only. A value far from its prediction counts less, and in the end not at all.

*Cost*: 17 scalars per stream; element-wise.

*Source*: Kalman, "A New Approach to Linear Filtering and Prediction Problems", 1960, J.
Basic Eng. 82(1). Magill, "Optimal Adaptive Estimation of Sampled Stochastic Processes",
1965, IEEE Trans. Autom. Control 10(4), for the hypotheses. West, "Robust Sequential
Approximate Bayesian Estimation", 1981, J. R. Stat. Soc. B 43(2), for the values that
count less. How well it works: ``benchmarks/noise_truth.py``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from optax_stability._core._numerics import ratio
from optax_stability._noise._statistics import (
    Averages,
    Observed,
    interval,
    is_learnable,
    student,
    update_averages,
)

# Relative change of ρ, as standard deviation, over 1/(1 − decay) steps: at the default
# decay 2 %, 10 % and 30 % from one step to the next.
_RATES = (0.2, 1.0, 3.0)
# What is believed before the first step, the constant first: changes are the exception,
# so that a constant noise scale is known as well as from its average alone.
_PRIOR = (0.9, 0.04, 0.03, 0.03)
# This share of the prior belief returns over 1/(1 − decay) steps: no hypothesis is ever
# given up.
_RETURN = 0.1
# From here on, in standard deviations, a value counts less; and the largest evidence of
# a step, as log likelihood: one step alone decides nothing.
_OUTLYING, _LARGEST_EVIDENCE, _SMALLEST_TRUST = 2.0, 1.0, 1e-12
# The mean trace of the last steps decays with the 15th power of ``decay``, the unit θ
# with the fifth.
_TRACE_POWER, _UNIT_POWER = 15, 5
# A trace above so many means counts as so many, once there is a mean of so many steps.
_LARGEST_TRACE, _FEW = 20.0, 5.0
# From step to step ρ moves by about this share of itself, whatever its trend.
_MOVES = 0.2
# So many standard deviations above 0, ρ may be 0, and cannot be any more.
_MAY_BE_0, _POSITIVE = 1.0, 1.5
# An interval of the average alone is at most so many times as far away.
_WIDEST = 10.0
# Bounds that keep every product within float32.
_SMALLEST_UNIT, _LARGEST_RATIO = 1e-10, 1e12


class Drift(NamedTuple):
    """How ρ = ‖G‖²/tr Σ moves, under each hypothesis.

    Attributes:
      mean_trace: float32[n] – mean of S over all steps that the averages remember.
      trace: float32[n] – mean of S over the last steps.
      trend: float32[n] – mean of S relative to that mean, which lags.
      trace_total: float32[n] – sum of their weights.
      signal: float32[n_rates, n] – ρ under each hypothesis with a change.
      variance: float32[n_rates, n] – its variance, in units of θ.
      belief: float32[1 + n_rates, n] – probabilities, the constant first.
      unit: float32[n] – θ.
      unit_total: float32[n] – sum of the weights of θ.
      steps: float32[n] – steps of equal weight that say as much as all that is known.
    """

    mean_trace: jax.Array
    trace: jax.Array
    trend: jax.Array
    trace_total: jax.Array
    signal: jax.Array
    variance: jax.Array
    belief: jax.Array
    unit: jax.Array
    unit_total: jax.Array
    steps: jax.Array


class Present(NamedTuple):
    """The noise scale of now, of n streams.

    Attributes:
      trace: float32[n] – tr Σ.
      signal: float32[n] – ρ; may be negative.
      ratio: float32[n] – B_simple, 0 where it is not ``valid``.
      low: float32[n] – lower end of its interval, 0 where it is unknown.
      high: float32[n] – upper end, ∞ where there is none.
      valid: bool[n] – whether ρ can be distinguished from 0.
    """

    trace: jax.Array
    signal: jax.Array
    ratio: jax.Array
    low: jax.Array
    high: jax.Array
    valid: jax.Array


def init_drift(streams: int) -> Drift:
    """The state before the first step."""

    # No array stands in two places: a state is donated.
    def zeros(*shape):
        return jnp.zeros((*shape, streams), jnp.float32)

    belief = jnp.broadcast_to(_column(_PRIOR), (len(_PRIOR), streams))
    return Drift(
        mean_trace=zeros(),
        trace=zeros(),
        trend=zeros(),
        trace_total=zeros(),
        signal=zeros(len(_RATES)),
        variance=zeros(len(_RATES)),
        belief=belief,
        unit=zeros(),
        unit_total=zeros(),
        steps=zeros(),
    )


def _column(values):
    return jnp.array(values, jnp.float32)[:, None]


def _select(condition, new, old):
    """``new`` for the streams where the condition holds, else ``old``."""

    def select(new, old):
        return jnp.where(jnp.broadcast_to(condition, new.shape), new, old)

    return jax.tree.map(select, new, old)


def _positive_or_one(size):
    return jnp.where(size > 0, size, 1.0)


def _variance_of_step(signal, observed: Observed):
    """h: the variance of G²/tr Σ in one step, in units of θ."""
    parts = observed.parts
    weight = jnp.where(observed.weight > 0, observed.weight, 1.0)
    return parts / weight**2 + 2 * (parts - 1) * jnp.maximum(signal, 0) / weight


def _mean_trace(drift: Drift, trace, decay) -> Drift:
    """The mean trace of the last steps; a spike raises it by a bounded factor."""
    limit = jnp.where(drift.trace_total > _FEW, _LARGEST_TRACE * drift.trace, jnp.inf)
    total = decay**_TRACE_POWER * drift.trace_total + 1
    trace = jnp.minimum(trace, limit)
    mean = drift.trace + (trace - drift.trace) / total
    trend = drift.trend + (trace / _positive_or_one(mean) - drift.trend) / total
    return drift._replace(trace=mean, trend=trend, trace_total=total)


def _believe(belief, errors, spread, decay):
    """The probabilities after a step, from the errors of the predictions.

    Args:
      belief: float32[1 + n_rates, n] – before the step.
      errors: in standard deviations of the predictions.
      spread: variances of the predictions, in any unit.
      decay: float32[] – how fast the prior returns.
    """
    # The likelihood of a normal distribution with exponential tails.
    inside = jnp.minimum(errors, _OUTLYING)
    evidence = jnp.square(inside) / 2 - inside * errors - jnp.log(spread) / 2
    most = jnp.max(evidence, 0, keepdims=True)
    evidence = jnp.maximum(evidence - most, -_LARGEST_EVIDENCE)
    returned = _RETURN * (1 - decay)
    belief = (1 - returned) * belief + returned * _column(_PRIOR)
    belief = belief * jnp.exp(evidence)
    return belief / jnp.sum(belief, 0, keepdims=True)


def _moved(drift: Drift, decay):
    """The variance of ρ under each change, one step later."""
    unit = jnp.maximum(drift.unit, _SMALLEST_UNIT)[None]
    reach = jnp.maximum(drift.signal, jnp.sqrt(unit * drift.variance) / 2)
    return drift.variance + jnp.square(_column(_RATES) * reach) * (1 - decay) / unit


def _follow(drift: Drift, constant: Averages, value, observed: Observed, decay):
    """Takes in y under every hypothesis; not before the second step.

    Args:
      drift: before the step.
      constant: the averages before the step: the prediction if nothing changes.
      value: float32[n] – y.
      observed: K and N of the step.
      decay: float32[] – weight of a step relative to the next.
    """
    scored = drift.unit_total[None] > 0
    variance = jnp.where(scored, _moved(drift, decay), drift.variance)
    mean = ratio(constant.grad_sq, constant.trace)
    predicted = jnp.concatenate([mean[None], drift.signal])
    of_step = _variance_of_step(predicted, observed)
    of_mean = of_step[:1] / jnp.maximum(constant.steps, 1)[None]
    spread = of_step + jnp.concatenate([of_mean, variance])
    error = value[None] - predicted
    squares = jnp.square(error) / spread
    unit = jnp.maximum(drift.unit, _SMALLEST_UNIT)[None]
    errors = jnp.where(scored, jnp.sqrt(squares / unit), 0.0)
    belief = _believe(drift.belief, errors, spread, decay)
    belief = jnp.where(scored, belief, drift.belief)
    # What is far from its prediction counts less, and in the end not at all.
    trust = jnp.square(jnp.minimum(1, _OUTLYING / jnp.maximum(errors, _OUTLYING)))

    total = decay**_UNIT_POWER * drift.unit_total + 1
    mean_square = jnp.sum(belief * trust * squares, 0)
    own = of_step[1:] / jnp.maximum(trust[1:], _SMALLEST_TRUST)
    gain = variance / (variance + own)
    variance = variance * (own / (variance + own))
    steps = jnp.concatenate([constant.steps[None] + 1, of_step[1:] / variance])
    return drift._replace(
        signal=drift.signal + gain * error[1:],
        variance=variance,
        belief=belief,
        unit=drift.unit + (mean_square - drift.unit) / total,
        unit_total=total,
        steps=jnp.sum(belief * steps, 0),
    )


def _first_step(drift: Drift, value, observed: Observed) -> Drift:
    """Every hypothesis starts at the first y."""
    of_step = _variance_of_step(value, observed)
    return drift._replace(
        signal=jnp.broadcast_to(value[None], drift.signal.shape),
        variance=jnp.broadcast_to(of_step[None], drift.variance.shape),
        steps=jnp.ones_like(value),
    )


def update(
    drift: Drift, constant: Averages, observed: Observed, decay
) -> tuple[Drift, Averages]:
    """Adds one step, where both numbers are finite and at most 1e36.

    Args:
      drift: before the step.
      constant: averages of S and G² in units of the mean trace, before the step.
      observed: S and G² of this step, of n streams.
      decay: float32[] – weight of the earlier steps relative to this one.
    """
    known = is_learnable(observed.trace, observed.grad_sq)
    trace, grad_sq = (jnp.where(known, x, 0.0) for x in observed[:2])
    size = jnp.where(drift.trace > 0, drift.trace, _positive_or_one(trace))
    averages = update_averages(constant, trace / size, grad_sq / size, decay)
    present_trace = _mean_trace(drift, trace, decay)
    value = grad_sq / _positive_or_one(present_trace.trace * present_trace.trend)
    value = jnp.clip(value, -_LARGEST_RATIO, _LARGEST_RATIO)
    later = _follow(present_trace, constant, value, observed, decay)
    first = _first_step(present_trace, value, observed)
    new = _select(constant.total > 0, later, first)
    mean_trace = drift.mean_trace + (trace - drift.mean_trace) / jnp.maximum(
        averages.total, 1
    )
    new = new._replace(mean_trace=mean_trace)
    for field in (*new, *averages):
        known &= jnp.all(jnp.isfinite(field.reshape(-1, known.size)), 0)
    return _select(known, (new, averages), (drift, constant))


def _changing(drift: Drift, constant: Averages):
    """Mean and variance of ρ under the hypotheses of a change, and their steps."""
    belief = drift.belief[1:]
    belief = ratio(belief, jnp.sum(belief, 0, keepdims=True))
    signal, variance = drift.signal, drift.unit[None] * drift.variance
    # ρ is relative to a mean trace which is uncertain itself.
    spread = ratio(jnp.square(constant.trace_spread), constant.total)
    of_trace = jnp.minimum(spread, 1) / jnp.maximum(2 * drift.trace_total - 1, 1)
    variance = variance + jnp.square(signal) * of_trace[None]
    mean = jnp.sum(belief * signal, 0, keepdims=True)
    variance = jnp.sum(belief * (variance + jnp.square(signal - mean)), 0)
    return mean[0], variance


def _interval_of_changing(mean, variance, quantile):
    """Low, middle and high of a positive ρ: log-normal, unless it may as well be 0.

    Between both the lower end goes to 0, so that B_simple loses its upper end without a
    jump. The middle is the median; what ρ moves from step to step widens the interval.
    """
    deviation = jnp.sqrt(variance + jnp.square(_MOVES * jnp.maximum(mean, 0)))
    positive = mean > _MAY_BE_0 * deviation
    above = ratio(mean, deviation) - _MAY_BE_0
    certain = jnp.clip(above / (_POSITIVE - _MAY_BE_0), 0, 1)
    certain = jnp.where(deviation > 0, certain, 1.0)
    relative = jnp.where(positive, variance / jnp.where(positive, mean, 1.0) ** 2, 1.0)
    median = jnp.maximum(mean, 0) / jnp.sqrt(1 + relative)
    factor = jnp.exp(quantile * jnp.sqrt(jnp.log1p(relative + _MOVES**2)))
    return (
        jnp.where(
            positive,
            certain * median / factor,
            jnp.minimum(mean - quantile * deviation, 0),
        ),
        jnp.where(positive, median, mean),
        jnp.where(
            positive, median * factor, jnp.maximum(mean, 0) + quantile * deviation
        ),
    )


def present(drift: Drift, constant: Averages, confidence) -> Present:
    """B_simple of now.

    Fieller's interval if the noise scale is constant, a log-normal one if it changes,
    and between them the mean of the ends, weighted by what is believed.
    """
    fixed = interval(constant, confidence)
    enough, _ = student(constant, confidence)
    mean, variance = _changing(drift, constant)
    quantile = ndtri((1 + confidence) / 2)
    low, middle, high = _interval_of_changing(mean, variance, quantile)
    # Without any noise there is no ρ, and nothing to follow.
    silent = ~(drift.trace > 0)
    share = drift.belief[0]
    signal = share * ratio(constant.grad_sq, constant.trace) + (1 - share) * middle
    # An average that knows nothing, such as that of a spike, has its share of a say.
    fixed_low = jnp.maximum(fixed.signal_low, -high)
    fixed_high = jnp.where(fixed.low > 0, ratio(1.0, fixed.low), jnp.inf)
    fixed_high = jnp.minimum(fixed_high, _WIDEST * high)
    signal_low = share * fixed_low + (1 - share) * low
    signal_high = share * fixed_high + (1 - share) * high
    least = ratio(1.0, signal_high)
    valid = enough & jnp.where(silent, fixed.valid, (signal_low > 0) & (signal > 0))
    most = jnp.where(silent, fixed.high, ratio(1.0, signal_low))
    return Present(
        trace=share * drift.mean_trace + (1 - share) * drift.trace,
        signal=jnp.where(silent, constant.grad_sq, signal),
        ratio=jnp.where(valid & ~silent, ratio(1.0, signal), 0.0),
        low=jnp.where(enough, jnp.where(silent, fixed.low, least), 0.0),
        high=jnp.where(valid, most, jnp.inf),
        valid=valid,
    )
