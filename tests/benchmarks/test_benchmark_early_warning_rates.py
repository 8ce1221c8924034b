"""Rates that are too high: what tells them, how early, and how that is counted."""

import jax
import numpy as np
import pytest
from early_warning.learning_rate.alternatives import (
    alternative_report,
    auc,
    choose_limit,
)
from early_warning.learning_rate.outcomes import best_of, crossing, leads, verdicts
from early_warning.learning_rate.rule import limit_report, rule_report
from early_warning.learning_rate.statistics import (
    RHO,
    STATISTICS,
    correlation,
    median_after,
)
from early_warning.settings import SETTINGS, Setting
from early_warning.trace import Trace

import optax_stability as ost

# Statistics of some thousand float32 values.
ROUNDING = 1e-4


def trace_of(**series):
    return Trace(**dict.fromkeys(Trace._fields, np.zeros(1)) | series)


def test_the_window_begins_with_the_first_step_after_the_warmup():
    series = np.stack([np.arange(20.0), np.zeros(20)])
    series[1, 3:5] = 100
    np.testing.assert_array_equal(median_after(series, 3, window=4), [4.5, 50])


def test_the_rule_reads_rho_after_the_warmup():
    rho = np.full((1, 1, 60), -1.0)
    rho[..., 30:40] = [0.3] * 6 + [-0.9] * 4
    statistic = STATISTICS[RHO]
    rates = np.zeros((1, 1))
    assert statistic.low
    assert statistic.of(trace_of(rho=rho), Setting(warmup=30), rates) == 0.3
    assert statistic.of(trace_of(rho=rho), Setting(warmup=29), rates) == 0.3
    assert statistic.of(trace_of(rho=rho), Setting(warmup=34), rates) == -0.9


@pytest.mark.parametrize("b1", [0.8, 0.9, 0.95])
def test_rho_is_that_of_the_library(b1):
    tx = ost.scale_by_safe_adam(b1, 0.999)
    grads = jax.random.normal(jax.random.key(0), (600, 50))

    def step(state, g):
        return tx.update(g, state)[1], None

    state, _ = jax.lax.scan(step, tx.init(grads[0]), grads)
    metrics = ost.metrics(state)
    rho = correlation(np.square(metrics["adam/update_rms"]), b1)
    np.testing.assert_allclose(metrics["adam/correlation"], rho, atol=ROUNDING)
    assert correlation(np.array(1.0), b1) == pytest.approx(1)


def test_verdicts_pair_the_seeds():
    finals = np.array([[3.0, 3.0], [2.5, 2.6], [2.52, 2.65], [2.7, 2.55], [np.nan, 9]])
    assert best_of(finals) == 1
    assert verdicts(finals).tolist() == [
        ["good", "good"],
        ["good", "good"],
        ["good", "between"],
        ["bad", "good"],
        ["bad", "bad"],
    ]


def losses_above(first, stop, steps=60, by=0.5):
    loss = np.full(steps, 2.0)
    loss[first:stop] += by
    return loss


def test_a_loss_crosses_when_its_mean_of_ten_is_above():
    reference = np.full(60, 2.0)
    # Three of ten by 0.5 are 0.15; two are 0.1, not more.
    assert crossing(losses_above(20, 60), reference) == 22
    assert crossing(losses_above(0, 60), reference) == 9
    assert crossing(losses_above(20, 60, by=np.nan), reference) == 20
    assert crossing(reference, reference) is None


def test_a_loss_that_comes_back_does_not_cross():
    reference = np.full(60, 2.0)
    # The means are above at steps 22 to 29, eight of them; then at 22 to 31.
    assert crossing(losses_above(20, 23), reference) is None
    assert crossing(losses_above(20, 25), reference) == 22


def test_lead_counts_from_the_tenth_step_after_the_warmup():
    loss = np.stack([losses_above(60, 60, 100), losses_above(50, 100, 100)])
    found = leads(trace_of(loss=loss[:, None]), np.array([[2.0], [2.5]]), warmup=30)
    assert found == [[None], [52 - 39]]


def test_auc_counts_ties_half():
    assert auc(np.array([1, 3]), np.array([1, 2])) == 2.5 / 4


def test_the_chosen_limit_is_between_the_classes():
    assert choose_limit(np.array([3.0, 4]), np.array([1.0, 2])) == 2.5
    assert choose_limit(np.array([2.0, 4, 5]), np.array([1.0, 3])) in (1.5, 3.5)


def report_of(values, verdict, lead):
    statistics = dict.fromkeys(STATISTICS, values)
    return {"statistics": statistics, "verdict": verdict, "lead": lead}


def test_recall_false_alarms_and_lead_of_the_rule():
    report = report_of(
        [[0.4, -0.1], [0.1, -0.2], [-0.3, -0.5]],
        [["good", "good"], ["between", "bad"], ["bad", "bad"]],
        [[None, None], [5, 10], [None, 40]],
    )
    assert rule_report(report) == {
        "flagged": {"bad": [3, 3], "between": [0, 1], "good": [1, 2]},
        "rho": {"bad": [-0.5, -0.2], "between": [0.1, 0.1], "good": [-0.1, 0.4]},
        "lead": [10, 25],
        "in_time": [2, 2],
        "flagged_but_never_seen": 1,
    }


def test_a_limit_is_tested_on_settings_it_was_not_chosen_on():
    names = list(SETTINGS)[:3]
    verdict = [["good", "bad"]]
    values = [[[0.5, -0.5]], [[-0.2, 0.2]], [[0.5, -0.5]]]
    reports = {
        name: report_of(each, verdict, [[None, None]])
        for name, each in zip(names, values, strict=True)
    }
    row = alternative_report(reports, RHO)
    assert row["limit"] == 0
    assert row["chosen"] == {"bad": [2, 2], "good": [0, 2]}
    assert row["tested"] == {"bad": [0, 1], "good": [1, 1]}
    # The setting that the rule was found on is left out.
    limits = limit_report(reports, RHO)
    assert limits["0"]["bad"] == [1, 2]
    assert rule_report(*reports.values())["flagged"] == {
        "bad": [2, 3],
        "between": [0, 0],
        "good": [1, 3],
    }
