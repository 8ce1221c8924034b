"""What a diagnosis says, and in which order."""

from typing import Literal, NamedTuple, get_args

# From what ends a run to what only makes it slow.
Kind = Literal[
    "nonfinite",
    "divergence",
    "underflow",
    "vanishing_then_surge",
    "exploding_gradient",
    "loss_spike",
    "learning_rate_too_high",
    "update_too_large",
    "growing_spectral_norm",
    "vanishing_gradient",
    "eps_dominated",
    "frequent_skips",
    "clipping_too_often",
    "bimodal_updates",
    "correlated_updates",
    "noise_too_high",
    "update_too_small",
    "plateau",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Finding(NamedTuple):
    """One thing that is wrong; prints as a short note.

    Attributes:
      kind: Kind – what is wrong, one of the names in the table of :func:`diagnose`.
      metric: str – the key of the history that shows it.
      step: int – the first abnormal step, a value of ``history["step"]``.
      layer: str or None – the layer that was affected first; None where no layer stands
        out or none was recorded.
      evidence: str – the numbers, and what they are held against.
      causes: tuple of str – what is likely behind it, likeliest first.
      remedies: tuple of str – what to do, naming functions of this library or of optax.
    """

    kind: Kind
    metric: str
    step: int
    layer: str | None
    evidence: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        """A note of several lines: what, when and where; evidence; causes; remedies."""
        where = f", first in {self.layer}" if self.layer else ""
        lines = [f"{self.kind} at step {self.step}{where} ({self.metric})"]
        lines.append(f"  evidence: {self.evidence}")
        lines += [f"  likely:   {cause}" for cause in self.causes]
        lines += [f"  try:      {remedy}" for remedy in self.remedies]
        return "\n".join(lines)


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Sorts in the order of ``KINDS``, then by step."""
    return sorted(findings, key=lambda each: (KINDS.index(each.kind), each.step))
