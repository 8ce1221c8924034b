"""What a second look at the skipped batches has shown, if the log has one.

A trainer may evaluate a batch again whose step was skipped: ``recheck/step`` is that
step, ``recheck/verdict`` is 1 if the loss is abnormal again, and 0 if it is normal.
"""

import numpy as np

from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History

_SAYS = {
    0.0: "looked at again, the batch of this step was normal: the machine was at fault",
    1.0: "looked at again, the batch of this step was abnormal: the data is at fault",
}


def with_rechecks(findings: list[Finding], history: History) -> list[Finding]:
    """Adds to the evidence whether data or machine were at fault."""
    steps = history.first_unprefixed("recheck/step")
    verdicts = history.first_unprefixed("recheck/verdict")
    if steps is None or verdicts is None:
        return findings
    verdict_of = dict(zip(steps.values, verdicts.values, strict=True))
    data = int(np.sum(verdicts.values == 1))
    machine = int(np.sum(verdicts.values == 0))
    counts = f"looked at again, {data} batches were abnormal and {machine} normal"
    return [_with_recheck(each, verdict_of, counts) for each in findings]


def _with_recheck(
    finding: Finding, verdict_of: dict[float, float], counts: str
) -> Finding:
    says = _SAYS.get(verdict_of.get(finding.step, np.nan))
    if finding.kind == "frequent_skips":
        says = counts
    if says is None:
        return finding
    return finding._replace(evidence=f"{finding.evidence}; {says}")
