"""What the doctor knows of one log: findings, checks, scores."""

from typing import NamedTuple

import numpy as np

from optax_stability._diagnosis._coverage import Check, cannot_be_told, coverage
from optax_stability._diagnosis._diagnose import diagnose
from optax_stability._diagnosis._finding import Finding
from optax_stability._diagnosis._series import History
from optax_stability._doctor import _comparison, _trainers
from optax_stability._doctor._comparison import Parting
from optax_stability._doctor._log import Log, UnreadableError
from optax_stability._doctor._scores import spike_score
from optax_stability._report._report import page_of


class Examination(NamedTuple):
    """Everything about one log.

    Attributes:
      log: the log.
      findings: what is wrong, the most severe first; what to do is spelled for the
        trainer of the log.
      checks: each check, and what it lacks.
      unknown: sentences on what the log cannot tell.
      spike_score: share of losses above 6 moving σ; None without a loss.
      partings: how it compares with a baseline.
    """

    log: Log
    findings: list[Finding]
    checks: list[Check]
    unknown: list[str]
    spike_score: float | None
    partings: list[Parting]

    @property
    def found(self) -> bool:
        """Whether there is something to report."""
        parted = any(each.step is not None for each in self.partings)
        return bool(self.findings) or parted

    def report(self) -> bytes:
        """The report as a page; needs matplotlib."""
        ours = _trainers.is_ours(self.log.trainer)
        findings = None if ours else self.findings
        return page_of(self.log.history, self.log.name, findings)


def examine(log: Log, baseline: Log | None = None) -> Examination:
    """Examines a log, alone or against a baseline.

    Raises:
      UnreadableError: its numbers are not those of a training log.
    """
    # A log may hold any numbers: overflow only affects comparisons.
    with np.errstate(all="ignore"):
        return _examine(log, baseline)


def _examine(log: Log, baseline: Log | None) -> Examination:
    try:
        findings = diagnose(log.history)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"{log.name}: {error}") from error
    findings = [
        each._replace(
            elsewhere=tuple(
                _trainers.spelled(advice, log.trainer) for advice in each.elsewhere
            )
        )
        for each in findings
    ]
    checked = History(log.history).without_probes().without_evaluations()
    checks, unknown = coverage(checked), cannot_be_told(checked)
    partings = []
    if baseline is not None:
        partings = _comparison.compare(log.history, baseline.history)
        unknown = [each for each in unknown if "--against" not in each]
    loss = log.history.get("loss")
    score = None if loss is None else spike_score(loss)
    return Examination(log, findings, checks, unknown, score, partings)
