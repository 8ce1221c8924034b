"""What the early-warning benchmark found is what its tables and the docs say."""

import json

import early_warning
import numpy as np
import pytest
import reporting
from early_warning.learning_rate import study as learning_rate
from early_warning.learning_rate.rule import rule_report
from early_warning.learning_rate.statistics import RHO, RHO_LATER
from early_warning.settings import SETTINGS, SPIKING
from early_warning.spikes import study as spikes
from early_warning.spikes.precursors import PRECURSORS
from early_warning.suite import header, rounded


@pytest.fixture(scope="module")
def report():
    return reporting.read("early_warning")


def test_the_result_is_that_of_a_full_run(report):
    assert list(report["rates"]["settings"]) == list(SETTINGS)
    assert list(report["spikes"]) == list(SPIKING)
    expected = rounded(header())
    for name in ("rule", "steps", "seeds", "rates_tried"):
        assert report[name] == json.loads(json.dumps(expected[name])), name
    for each in report["rates"]["settings"].values():
        values = np.array(each["held_out_loss"])
        assert values.shape == (len(learning_rate.RATES), learning_rate.SEEDS)
    for b2, group in SPIKING.items():
        runs = len(group) * (spikes.SEEDS - spikes.SEEN)
        assert report["spikes"][b2]["runs"] == runs
        assert set(report["spikes"][b2]["precursors"]) == set(PRECURSORS)


def test_the_tables_follow_from_the_runs(report):
    settings = report["rates"]["settings"]
    for each in settings.values():
        assert rounded(rule_report(each)) == each["rule"]
    again = rounded(learning_rate.compare(settings))
    # Rounded scores may tie, or move a limit between them.
    assert again["limits"] == report["rates"]["limits"]
    assert again["others"] == report["rates"]["others"]
    for name, row in again["alternatives"].items():
        stored = report["rates"]["alternatives"][name]
        assert row["tested"] == stored["tested"], name
        assert row["auc"] == pytest.approx(stored["auc"], abs=1e-3)
    assert all(early_warning.tables(report).values())


def test_a_negative_correlation_flags_most_rates_that_are_too_high(report):
    rates = report["rates"]
    caught, bad = rates["others"]["flagged"]["bad"]
    false, good = rates["others"]["flagged"]["good"]
    assert caught > 0.85 * bad
    assert false < 0.05 * good
    # It is better than a limit on the rate, and no worse than any other statistic.
    auc = {name: row["auc"] for name, row in rates["alternatives"].items()}
    assert auc[RHO] > auc["control: the rate itself"]
    assert auc[RHO_LATER] == max(auc.values())
    # Stricter, and after the early descent, it is hardly ever wrong.
    strict = rates["limits"][RHO_LATER]["-0.2"]
    assert strict["good"][0] <= 0.03 * strict["good"][1]
    assert strict["bad"][0] > 0.8 * strict["bad"][1]
    assert strict["between"][0] == 0


def test_it_fails_with_a_short_warmup_and_is_often_late(report):
    rates = report["rates"]
    caught, bad = rates["settings"]["warm-up 10"]["rule"]["flagged"]["bad"]
    assert caught <= bad / 2
    in_time, caught = rates["others"]["in_time"]
    assert 0.7 < in_time / caught < 0.8
    assert rates["others"]["lead"][0] < 0


def test_the_update_rms_beats_matched_controls_but_the_loss_only_at_high_b2(report):
    for each in report["spikes"].values():
        row = each["precursors"]["update rms"]
        assert row["before_onset"]["low"] > 0.5
        # What theory expects to fall does not.
        low = each["precursors"]["Σg²/Σv̂ low, stalest leaf"]["before_onset"]["low"]
        assert low < 0.5
    rows = {b2: x["precursors"]["update rms"] for b2, x in report["spikes"].items()}
    assert rows["0.95"]["minus_loss"]["low"] < 0 < rows["0.95"]["minus_loss"]["high"]
    assert rows["0.95"]["clean"]["low"] < 0.5
    assert rows["0.999"]["clean"]["low"] > 0.5
    jumps = report["spikes"]["0.999"]["jumps"]["2"]
    assert jumps["recall"][0] > 0.9 * jumps["recall"][1]
    assert jumps["false_per_1000"] < 1
