"""Asks every rule, and leaves out what only follows from something else."""

import numpy as np

from optax_stability._diagnosis import (
    _decisions,
    _exploding,
    _learning_rate,
    _loss,
    _noise,
    _nonfinite,
    _precision,
    _standstill,
    _updates,
    _vanishing,
    _weights,
)
from optax_stability._diagnosis import _thresholds as limits
from optax_stability._diagnosis._finding import Finding, by_severity
from optax_stability._diagnosis._series import History

_RULES = (
    _nonfinite.nonfinite,
    _loss.divergence,
    _precision.underflow,
    _vanishing.vanishing_then_surge,
    _exploding.exploding_gradient,
    _loss.loss_spike,
    _learning_rate.learning_rate_too_high,
    _updates.update_too_large,
    _weights.growing_spectral_norm,
    _vanishing.vanishing_gradient,
    _precision.eps_dominated,
    _decisions.frequent_skips,
    _decisions.clipping_too_often,
    _updates.bimodal_updates,
    _updates.correlated_updates,
    _noise.noise_too_high,
    _updates.update_too_small,
    _standstill.plateau,
)

# What follows from what, if it does not begin clearly earlier.
_CONSEQUENCES = {
    "divergence": (
        "loss_spike",
        "underflow",
        "exploding_gradient",
        "vanishing_then_surge",
        "vanishing_gradient",
        "growing_spectral_norm",
        "clipping_too_often",
        "bimodal_updates",
        "correlated_updates",
        "noise_too_high",
        "plateau",
    ),
    "underflow": (
        "vanishing_then_surge",
        "vanishing_gradient",
        "eps_dominated",
        "plateau",
    ),
    "vanishing_then_surge": ("vanishing_gradient", "exploding_gradient"),
    # The loss of a step and its gradient are of the same weights: a jump of both at
    # once comes from the batch. A gradient that jumps earlier is a finding of its own.
    "loss_spike": ("exploding_gradient",),
}
# A divergence begins a few rows before the loss is above its limit; and a spike does
# not explain what comes long after it.
_LEAD = {"divergence": limits.CENTRE}
_REACH = {"loss_spike": limits.CENTRE}


def _follows(each: Finding, cause: Finding, steps: np.ndarray) -> bool:
    """Whether a finding is a consequence of another."""
    if each.kind not in _CONSEQUENCES.get(cause.kind, ()):
        return False
    later = np.searchsorted(steps, each.step) - np.searchsorted(steps, cause.step)
    lead, reach = _LEAD.get(cause.kind, 0), _REACH.get(cause.kind, len(steps))
    return bool(-lead <= later <= reach)


def _without_consequences(findings: list[Finding], steps: np.ndarray) -> list[Finding]:
    """Leaves out what begins with or after something it follows from."""
    return [
        each
        for each in findings
        if not any(_follows(each, cause, steps) for cause in findings)
    ]


def diagnose(history: dict[str, np.ndarray]) -> list[Finding]:
    """Says what is wrong with a run, since when, in which layer, and what helps.

    Works on what :func:`history` returns, or on any log of the same form. Nothing is
    guessed: a rule whose metrics are missing is silent.

    ==========================  ========================================================
    kind                        found where
    ==========================  ========================================================
    ``nonfinite``               NaN or Inf in loss, gradient, update or parameters
    ``divergence``              the loss rose above its best, and stays
    ``underflow``               exact zeros in half of the layers, or everywhere
    ``vanishing_then_surge``    a shallow layer's gradient falls ÷100, and jumps ×10
    ``exploding_gradient``      ×10 above its trend, lasting or confirmed by the loss
    ``loss_spike``              half a nat and 7 σ above its trend
    ``learning_rate_too_high``  ρ̂ far below 0 after the warm-up: each step overshoots
    ``update_too_large``        a tenth of the weights per step, a third of a layer's
    ``growing_spectral_norm``   a singular value that grows faster and faster
    ``vanishing_gradient``      ÷100 since the early descent, far more than the loss
    ``eps_dominated``           Adam's ε above √v̂
    ``frequent_skips``          more than one step in 16
    ``clipping_too_often``      more than 95 of 100 steps
    ``bimodal_updates``         ± the same, having been spread around zero
    ``correlated_updates``      the same gradient again and again
    ``noise_too_high``          noise scale above 20 batches
    ``update_too_small``        a millionth of the weights per step
    ``plateau``                 a flat loss that has not converged
    ==========================  ========================================================

    **Guarantees**

    * At most one finding of a kind: of the first event, with the number of events and
      the worst in its evidence. What follows from another finding is left out.
    * A step that is not finite does not blind the statistics of later ones.
    * Values that are repeated between measurements count once.
    * The order is by severity, as in the table.

    **Edge cases**: an empty history has no findings; nor has one that is too short for
    a rule, or that begins too late for it. Steps may have gaps: windows are counted in
    rows. NaN is a value that was not measured, unless it was until then. Rows of probes
    (``branch/probed``) are of other parameters, and are left out.

    Args:
      history: metric name to one number per step, oldest first, all of one length, and
        ``step``. Known names: ``loss`` (or ``skip/value``), ``learning_rate`` (which
        tells warm-up and decay), ``record`` under ``grad``, ``update`` and ``params``,
        and the metrics of this library's states, each also ``<key>/<leaf name>``.

    Returns:
      The findings, the most severe first; none for a healthy run.

    Raises:
      TypeError: ``history`` is no dict, or holds what is no numbers.
      ValueError: it has no ``step``, a step is not finite, or lengths differ.

    Example:
      >>> history = {"step": np.arange(100), "loss": np.full(100, 2.31)}
      >>> history["loss"][60] = 5.81
      >>> print(diagnose(history)[0].evidence)
      loss 5.81 at step 60, 2.31 before (median of 8): +3.50, limit +0.50;
      steps above: 1, events: 1, worst +3.50 at step 60
    """
    checked = History(history).without_probes()
    # Anything may stand in a history; what overflows is compared, never trusted.
    with np.errstate(all="ignore"):
        found = [rule(checked) for rule in _RULES] if checked.length else []
    found = [each for each in found if each]
    return by_severity(_without_consequences(found, checked.steps))
