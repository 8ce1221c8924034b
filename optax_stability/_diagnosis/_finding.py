"""The findings of a diagnosis, and their order."""

from typing import Literal, NamedTuple, get_args

# By severity: from kinds that end a run to kinds that only slow it down.
Kind = Literal[
    "nonfinite",
    "divergence",
    "underflow",
    "vanishing_then_surge",
    "exploding_gradient",
    "loss_spike",
    "loss_stuck",
    "learning_rate_zero",
    "learning_rate_too_high",
    "attention_saturates",
    "update_too_large",
    "growing_spectral_norm",
    "vanishing_gradient",
    "overfitting",
    "eps_dominated",
    "guard_loss_constant",
    "frequent_skips",
    "skip_budget_spent",
    "clustered_skips",
    "clipping_too_often",
    "misplaced_clip",
    "dominant_layer",
    "bimodal_updates",
    "correlated_updates",
    "noise_too_high",
    "update_too_small",
    "plateau",
    "several_runs",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Finding(NamedTuple):
    """One problem of a run; prints as a short note.

    Attributes:
      kind: Kind – the problem, one of the names in the table of :func:`diagnose`.
      metric: str – the key of the history that shows the problem.
      step: int – the first abnormal step, a value of ``history["step"]``.
      layer: str or None – the layer that was affected first; None if no layer stands
        out or none was recorded.
      evidence: str – the measured values and their limits.
      causes: tuple of str – likely causes, likeliest first.
      remedies: tuple of str – what to do, with functions of this library or of optax.
      elsewhere: tuple of str – what to do in any other framework, in words.
    """

    kind: Kind
    metric: str
    step: int
    layer: str | None
    evidence: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Several lines: kind, step and layer; evidence; causes; remedies."""
        where = f", first in {self.layer}" if self.layer else ""
        lines = [f"{self.kind} at step {self.step}{where} ({self.metric})"]
        lines.append(f"  evidence: {self.evidence}")
        lines += [f"  likely:   {cause}" for cause in self.causes]
        lines += [f"  try:      {remedy}" for remedy in self.remedies]
        return "\n".join(lines)


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Sorts in the order of ``KINDS``, then by step."""
    return sorted(findings, key=lambda each: (KINDS.index(each.kind), each.step))
