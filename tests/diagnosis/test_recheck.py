"""Whether data or machine were at fault, where a log tells."""

import numpy as np
import pytest

import optax_stability as ost


def history(**columns):
    """A hundred good steps and a spike at step 60."""
    loss = np.full(100, 2.31)
    loss[60] = 5.81
    return {"step": np.arange(100), "loss": loss} | columns


def rechecks(*verdicts):
    """By the row after each step, as the trainer writes them."""
    step, verdict = np.full(100, np.nan), np.full(100, np.nan)
    for at, value in verdicts:
        step[at + 1], verdict[at + 1] = at, value
    return {"recheck/step": step, "recheck/verdict": verdict}


@pytest.mark.parametrize(
    ("verdict", "says"),
    [(1, "abnormal: the data is at fault"), (0, "normal: the machine was at fault")],
)
def test_a_finding_says_what_was_at_fault(verdict, says):
    (before,) = ost.diagnose(history())
    (after,) = ost.diagnose(history(**rechecks((60, verdict), (30, 1 - verdict))))
    start = "looked at again, the batch of this step was "
    assert after.evidence == f"{before.evidence}; {start}{says}"
    assert after._replace(evidence="") == before._replace(evidence="")


def test_a_recheck_of_other_steps_says_nothing():
    assert ost.diagnose(history(**rechecks((30, 1)))) == ost.diagnose(history())
    empty = rechecks()
    assert ost.diagnose(history(**empty)) == ost.diagnose(history())


def test_frequent_skips_are_counted_by_what_was_at_fault():
    skipped = np.zeros(100)
    skipped[20:40] = 1
    found = rechecks(*((at, at < 25) for at in range(20, 40)))
    (finding,) = ost.diagnose({"step": np.arange(100), "skip/skipped": skipped} | found)
    assert finding.kind == "frequent_skips"
    assert finding.evidence.endswith(
        "; looked at again, 5 batches were abnormal and 15 normal"
    )
