"""Applies every rule, and omits findings that are consequences of another."""

import numpy as np

from optax_stability._diagnosis import (
    _attention,
    _decisions,
    _dominance,
    _exploding,
    _guarded_loss,
    _held_out,
    _learning_rate,
    _loss,
    _noise,
    _nonfinite,
    _precision,
    _recheck,
    _runs,
    _standstill,
    _updates,
    _vanishing,
    _weights,
)
from optax_stability._diagnosis import _limits as limits
from optax_stability._diagnosis._finding import Finding, by_severity
from optax_stability._diagnosis._series import History

_RULES = (
    _nonfinite.nonfinite,
    _loss.divergence,
    _precision.underflow,
    _vanishing.vanishing_then_surge,
    _exploding.exploding_gradient,
    _loss.loss_spike,
    _standstill.loss_stuck,
    _learning_rate.learning_rate_zero,
    _learning_rate.learning_rate_too_high,
    _attention.attention_saturates,
    _updates.update_too_large,
    _weights.growing_spectral_norm,
    _vanishing.vanishing_gradient,
    _held_out.overfitting,
    _precision.eps_dominated,
    _guarded_loss.guard_loss_constant,
    _decisions.frequent_skips,
    _decisions.skip_budget_spent,
    _decisions.clustered_skips,
    _decisions.clipping_too_often,
    _decisions.misplaced_clip,
    _dominance.dominant_layer,
    _updates.bimodal_updates,
    _updates.correlated_updates,
    _noise.noise_too_high,
    _updates.update_too_small,
    _standstill.plateau,
)

# The consequences of each kind: omitted unless they begin clearly earlier than it.
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
        "overfitting",
    ),
    # Nothing is learned at rate 0, and a loss that is exactly the same is flat.
    "learning_rate_zero": ("plateau", "loss_stuck", "update_too_small"),
    "loss_stuck": ("plateau",),
    # Steps that overshoot show in the loss now and then.
    "learning_rate_too_high": ("loss_spike",),
    # Corrupted data that are everywhere are at no particular place.
    "frequent_skips": ("clustered_skips", "skip_budget_spent"),
    "underflow": (
        "vanishing_then_surge",
        "vanishing_gradient",
        "eps_dominated",
        "plateau",
    ),
    "vanishing_then_surge": ("vanishing_gradient", "exploding_gradient"),
    # The loss and the gradient of a step belong to the same weights: a jump of both in
    # one step comes from the batch. A gradient that jumps earlier is its own finding.
    "loss_spike": ("exploding_gradient",),
}
# In rows. A divergence begins a few rows before the loss exceeds its limit, and a spike
# does not explain findings long after it.
_MAX_LEAD = {"divergence": limits.CENTRE}
_MAX_LAG = {"loss_spike": limits.CENTRE}
# Findings about a run as a whole, whose step is where the judgement begins.
_WHOLE_RUN = ("plateau",)


def _follows(each: Finding, cause: Finding, steps: np.ndarray) -> bool:
    """Whether a finding is a consequence of another."""
    if each.kind not in _CONSEQUENCES.get(cause.kind, ()):
        return False
    if each.kind in _WHOLE_RUN:
        return True
    later = np.searchsorted(steps, each.step) - np.searchsorted(steps, cause.step)
    lead, reach = _MAX_LEAD.get(cause.kind, 0), _MAX_LAG.get(cause.kind, len(steps))
    return bool(-lead <= later <= reach)


def _without_consequences(findings: list[Finding], steps: np.ndarray) -> list[Finding]:
    """Omits findings that are consequences of another finding."""
    return [
        each
        for each in findings
        if not any(_follows(each, cause, steps) for cause in findings)
    ]


def diagnose(history: dict[str, np.ndarray]) -> list[Finding]:
    """Reports what is wrong with a run: since when, in which layer, and what helps.

    Reads what :func:`history` returns, or any log of the same form. A rule whose
    metrics are missing finds nothing.

    ==========================  ========================================================
    kind                        criterion
    ==========================  ========================================================
    ``nonfinite``               NaN or Inf in loss, gradient, update or parameters
    ``divergence``              the loss rose above its minimum, and stays there
    ``underflow``               exact zeros in half of the layers, or everywhere
    ``vanishing_then_surge``    a shallow layer's gradient falls ÷100, then jumps ×10
    ``exploding_gradient``      norm ×10 above normal, lasting or with a loss jump
    ``loss_spike``              loss at least 0.5 nat and 7 σ above its recent level
    ``loss_stuck``              exactly the same loss until the end
    ``learning_rate_zero``      a learning rate of 0 in a quarter of the run
    ``learning_rate_too_high``  ρ̂ far below 0 after the warm-up: each step overshoots
    ``attention_saturates``     attention logits above 50, or their bound above 250
    ``update_too_large``        ‖update‖/‖parameters‖ ≥ 0.1, or ≥ 0.3 in a layer
    ``growing_spectral_norm``   a singular value whose growth accelerates
    ``vanishing_gradient``      ÷100 since the early descent, far more than the loss
    ``overfitting``             the held-out loss rises, and the training loss falls
    ``eps_dominated``           Adam's ε above √v̂
    ``guard_loss_constant``     a guard is given the same number in place of the loss
    ``frequent_skips``          more than 1 in 16 steps are skipped
    ``skip_budget_spent``       a spike was taken because no skip was left
    ``clustered_skips``         skips at the same position of every epoch
    ``clipping_too_often``      more than 95 of 100 steps are clipped by a third
    ``misplaced_clip``          the clip sees a normalised update, not the gradient
    ``dominant_layer``          one layer is 95 % of the squared gradient norm
    ``bimodal_updates``         all entries ±a, after a spread around zero
    ``correlated_updates``      nearly the same gradient at every step
    ``noise_too_high``          noise scale above 20 batch sizes
    ``update_too_small``        ‖update‖/‖parameters‖ ≤ 1e-6
    ``plateau``                 a flat loss that has not converged
    ``several_runs``            step or learning rate begin again, and the loss jumps
    ==========================  ========================================================

    **Guarantees**

    * At most one finding per kind: for the first event; the evidence gives the number
      of events and the worst. Consequences of another finding are omitted.
    * What was normal is known from the rows before alone, the first three on, and is
      measured in rows: a row may stand for one step or for fifty.
    * Several trainings in one history are diagnosed each for itself; a finding is that
      of the first training that has it.
    * A non-finite step does not disturb the statistics of later steps.
    * A value that is repeated between measurements counts once.
    * The findings are sorted by severity, in the order of the table.

    **Edge cases**: an empty history has no findings; a rule finds nothing in a history
    that is too short for it, or that begins too late. Steps may have gaps: windows are
    counted in rows. NaN means "not measured", unless the metric was measured at every
    step until then. Rows of probes (``branch/probed``) were measured on the snapshot,
    and are ignored.

    Args:
      history: maps metric names, and ``step``, to one number per step, oldest first,
        all of one length. Known names: ``loss`` (or ``skip/value``), ``eval/loss`` (on
        held-out data, NaN in rows without an evaluation), ``learning_rate`` (which
        shows warm-up and decay), ``epoch``, the metrics of ``record`` under ``grad``,
        ``update`` and ``params``, ``extra/attention_logits`` of ``record_extra``, and
        the metrics of this library's states, each also as
        ``<key>/<leaf name>``; ``recheck/step`` and ``recheck/verdict``, 1 or 0, if the
        batch of a skipped step was evaluated again and was abnormal or normal.

    Returns:
      The findings, the most severe first; an empty list for a healthy run.

    Raises:
      TypeError: ``history`` is not a dict, or holds values that are not numbers.
      ValueError: ``history`` has no ``step``, a step is not finite, the steps run
        backwards, or lengths differ.

    Example:
      >>> history = {"step": np.arange(100), "loss": np.full(100, 2.31)}
      >>> history["loss"][60] = 5.81
      >>> print(diagnose(history)[0].evidence)
      loss 5.81 at step 60, 2.31 before (median of 8): +3.50, limit +0.50;
      steps above the limit: 1, events: 1, worst +3.50 at step 60
    """
    checked = History(history).without_probes().without_evaluations()
    # A history may hold any numbers: overflow only affects comparisons.
    with np.errstate(all="ignore"):
        first_rows = _runs.starts(checked)
        ends = [*first_rows[1:], checked.length]
        runs = [
            checked.part(start, stop)
            for start, stop in zip(first_rows, ends, strict=True)
        ]
        found = _first_of_each_kind([_findings_of(run) for run in runs])
        several = _runs.several_runs(checked, first_rows)
    found = by_severity([*found, several] if several else found)
    return _recheck.with_rechecks(found, checked)


def _findings_of(run: History) -> list[Finding]:
    """The findings of one training."""
    found = [rule(run) for rule in _RULES] if run.length else []
    return _without_consequences([each for each in found if each], run.steps)


def _first_of_each_kind(runs: list[list[Finding]]) -> list[Finding]:
    """Of several trainings, the first finding of each kind, and how often it came."""
    first: dict[str, Finding] = {}
    count: dict[str, int] = {}
    for each in (each for found in runs for each in found):
        first.setdefault(each.kind, each)
        count[each.kind] = count.get(each.kind, 0) + 1
    return [
        each
        if count[kind] == 1
        else each._replace(
            evidence=f"{each.evidence}; in {count[kind]} of {len(runs)} trainings"
        )
        for kind, each in first.items()
    ]
