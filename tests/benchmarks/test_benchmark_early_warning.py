"""The measures of the early-warning benchmark count what they say."""

import json

import early_warning
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reporting
from early_warning import Case, Setting, Trace

import optax_stability as ost

# Statistics of some thousand float32 values.
STATISTICS = 1e-4


def trace_of(**series):
    return Trace(**dict.fromkeys(Trace._fields, np.zeros(1)) | series)


# --- the learning rate --------------------------------------------------------------


def test_the_window_begins_with_the_first_step_after_the_warmup():
    series = np.stack([np.arange(20.0), np.zeros(20)])
    series[1, 3:5] = 100
    np.testing.assert_array_equal(
        early_warning.median_after(series, 3, window=4), [4.5, 50]
    )


def test_the_rule_reads_rho_after_the_warmup():
    rho = np.full((1, 1, 60), -1.0)
    rho[..., 30:40] = [0.3] * 6 + [-0.9] * 4
    statistic = early_warning.STATISTICS[early_warning.RHO]
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
    rho = early_warning.correlation(np.square(metrics["adam/update_rms"]), b1)
    np.testing.assert_allclose(metrics["adam/correlation"], rho, atol=STATISTICS)
    assert early_warning.correlation(np.array(1.0), b1) == pytest.approx(1)


def test_verdicts_pair_the_seeds():
    finals = np.array([[3.0, 3.0], [2.5, 2.6], [2.52, 2.65], [2.7, 2.55], [np.nan, 9]])
    assert early_warning.best_of(finals) == 1
    assert early_warning.verdicts(finals).tolist() == [
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
    assert early_warning.crossing(losses_above(20, 60), reference) == 22
    assert early_warning.crossing(losses_above(0, 60), reference) == 9
    assert early_warning.crossing(losses_above(20, 60, by=np.nan), reference) == 20
    assert early_warning.crossing(reference, reference) is None


def test_a_loss_that_comes_back_does_not_cross():
    reference = np.full(60, 2.0)
    # The means are above at steps 22 to 29, eight of them; then at 22 to 31.
    assert early_warning.crossing(losses_above(20, 23), reference) is None
    assert early_warning.crossing(losses_above(20, 25), reference) == 22


def test_lead_counts_from_the_tenth_step_after_the_warmup():
    loss = np.stack([losses_above(60, 60, 100), losses_above(50, 100, 100)])
    found = early_warning.leads(
        trace_of(loss=loss[:, None]), np.array([[2.0], [2.5]]), warmup=30
    )
    assert found == [[None], [52 - 39]]


def test_auc_counts_ties_half():
    assert early_warning.auc(np.array([1, 3]), np.array([1, 2])) == 2.5 / 4


def test_the_chosen_limit_is_between_the_classes():
    choose = early_warning.choose_limit
    assert choose(np.array([3.0, 4]), np.array([1.0, 2])) == 2.5
    assert choose(np.array([2.0, 4, 5]), np.array([1.0, 3])) in (1.5, 3.5)


def report_of(values, verdict, lead):
    statistics = dict.fromkeys(early_warning.STATISTICS, values)
    return {"statistics": statistics, "verdict": verdict, "lead": lead}


def test_recall_false_alarms_and_lead_of_the_rule():
    report = report_of(
        [[0.4, -0.1], [0.1, -0.2], [-0.3, -0.5]],
        [["good", "good"], ["between", "bad"], ["bad", "bad"]],
        [[None, None], [5, 10], [None, 40]],
    )
    assert early_warning.rule_report(report) == {
        "flagged": {"bad": [3, 3], "between": [0, 1], "good": [1, 2]},
        "rho": {"bad": [-0.5, -0.2], "between": [0.1, 0.1], "good": [-0.1, 0.4]},
        "lead": [10, 25],
        "in_time": [2, 2],
        "flagged_but_never_seen": 1,
    }


def test_a_limit_is_tested_on_settings_it_was_not_chosen_on():
    names = list(early_warning.SETTINGS)[:3]
    verdict = [["good", "bad"]]
    values = [[[0.5, -0.5]], [[-0.2, 0.2]], [[0.5, -0.5]]]
    reports = {
        name: report_of(each, verdict, [[None, None]])
        for name, each in zip(names, values, strict=True)
    }
    row = early_warning.alternative_report(reports, early_warning.RHO)
    assert row["limit"] == 0
    assert row["chosen"] == {"bad": [2, 2], "good": [0, 2]}
    assert row["tested"] == {"bad": [0, 1], "good": [1, 1]}
    # The setting that the rule was found on is left out.
    limits = early_warning.limit_report(reports, early_warning.RHO)
    assert limits["0"]["bad"] == [1, 2]
    assert early_warning.rule_report(*reports.values())["flagged"] == {
        "bad": [2, 3],
        "between": [0, 0],
        "good": [1, 3],
    }


# --- spikes -------------------------------------------------------------------------


def abnormal_at(*steps, length=300):
    abnormal = np.zeros(length, bool)
    abnormal[list(steps)] = True
    return abnormal


def test_abnormal_is_half_a_nat_above_the_trend():
    loss = 4 - 0.01 * np.arange(100) + 0.02 * np.sin(np.arange(100))
    higher = loss.copy()
    higher[[50, 70, 90]] += [0.6, 0.4, np.nan]
    abnormal = early_warning.abnormal_steps(jnp.array([loss, higher]))
    assert np.argwhere(abnormal).tolist() == [[1, 50], [1, 90]]


def test_one_hard_batch_is_no_spike():
    def spiking(*steps):
        return np.flatnonzero(early_warning.spiking_steps(abnormal_at(*steps))).tolist()

    assert spiking(100, 104, 120, 298, 299) == [100, 104, 298, 299]
    assert spiking(100, 105) == []


def test_a_spike_comes_after_quiet_steps():
    def onsets(*steps):
        return early_warning.onsets(abnormal_at(*steps))

    assert onsets(100, 101, 141, 142, 182, 183) == [100]
    assert onsets(100, 101, 142, 143) == [100, 142]
    assert onsets(40, 41) == []


def test_a_clean_spike_has_no_abnormal_loss_before():
    case = Case("x", 1, 150, [0])
    for step, expected in ((109, True), (110, False), (149, False), (150, True)):
        abnormal = np.stack([abnormal_at(130), abnormal_at(step)])
        assert early_warning.is_clean(case, abnormal) == expected


def test_quiet_is_neither_before_nor_after():
    quiet = early_warning.quiet_steps(abnormal_at(150))
    expected = [*range(64, 120), *range(191, 300)]
    assert np.flatnonzero(quiet).tolist() == expected


def test_z_scores_are_of_the_steps_before():
    series = np.tile([0.0, 2.0], 40)[None]
    series[0, 50] = 9
    z = early_warning.z_score(series)
    # Median 1, median deviation 1.
    np.testing.assert_allclose(z[0, 50], 8 / 1.4826)
    np.testing.assert_allclose(np.abs(z[0, 32:50]), 1 / 1.4826)
    assert not z[0, :32].any()


def test_a_jump_is_relative_to_the_median_of_the_past():
    series = np.tile([1.0, 3.0], 40)[None]
    series[0, 50] = 8
    ratio = early_warning.jump(series)
    assert ratio[0, [10, 31, 50]].tolist() == [0, 0, 4]
    # Of the 32 before, 15 are now 1, and the median is 3.
    assert ratio[0, 51] == 1
    assert early_warning.jumps_in_health(np.ones((3, 70)), np.array([1, 1, 0]) > 0) == [
        *[0] * len(early_warning.JUMPS),
        2 * 6,
    ]


def test_trailing_means_end_with_the_step():
    means = early_warning.trailing_mean(np.arange(20.0), window=4)
    assert means[[2, 3, 19]].tolist() == [0, 1.5, 17.5]


def test_controls_are_other_quiet_runs_at_the_same_step():
    spiking = np.stack(
        [
            abnormal_at(150, 151),
            abnormal_at(),
            abnormal_at(175, 176),  # too soon after
            abnormal_at(120, 121),  # too recently before, and a case of its own
            abnormal_at(200, 201),
        ]
    )
    assert early_warning.cases_of("x", spiking) == [
        Case("x", 0, 150, [1, 4]),
        Case("x", 2, 175, [1, 3]),
        Case("x", 3, 120, [1, 2, 4]),
        Case("x", 4, 200, [0, 1, 3]),
    ]


def test_a_case_is_compared_with_its_controls_before_the_spike():
    series = np.zeros((4, 300))
    series[0, [119, 150, 148]] = [9, 9, 2]
    series[1, 120] = 1
    series[2, 146] = 2
    series[3] = 7
    case = Case("x", 0, 150, [1, 2])
    wins = early_warning.wins_of(case, series, last=1)
    np.testing.assert_array_equal(wins, [np.nan, 1, 0.5, np.nan])
    # Without the last four steps, 146 to 149, all that is left is run 1.
    wins = early_warning.wins_of(case, series, last=5)
    np.testing.assert_array_equal(wins, [np.nan, 0, 0.5, np.nan])


def test_each_spike_counts_once_however_many_controls():
    nan = np.nan
    wins = np.array([[nan, 1, 0, 0, 0], [nan, 1, nan, nan, nan]])
    runs = np.array([0, 0])
    auc = early_warning.matched_auc
    assert auc(wins, np.ones(5), runs) == (0.25 + 1) / 2
    assert auc(wins, np.array([2, 1, 1, 0, 0]), runs) == (0.5 + 1) / 2
    # A spike whose controls were not drawn does not count.
    assert auc(wins, np.array([1, 0, 1, 1, 1]), runs) == 0


def matched(cases, series, last):
    wins = early_warning.all_wins(cases, series, last)
    return early_warning.matched(cases, series, wins)


def test_the_bootstrap_tells_a_precursor_from_noise():
    rng = np.random.default_rng(0)
    steps = {run: 100 + 40 * run for run in range(5)}
    cases = [
        Case("y", run, step, [i for i in steps if i != run])
        for run, step in steps.items()
    ]
    noise = rng.standard_normal((5, 300))
    none = matched(cases, {"x": noise[:2], "y": noise}, last=1)
    assert none is not None
    assert none["low"] < 0.5 < none["high"]
    for run, step in steps.items():
        noise[run, step - 20 : step] += 50
    seen = matched(cases, {"x": noise[:2], "y": noise}, last=5)
    assert seen == {"auc": 1, "low": 1, "high": 1}
    assert matched([], {"x": noise}, last=1) is None


def test_the_first_alarm_counts_back_from_the_spike():
    alarms = np.zeros(200, bool)
    alarms[[69, 100]] = True
    assert early_warning.first_alarm(alarms, 100) is None
    assert early_warning.first_alarm(alarms, 99) == 30
    assert early_warning.first_alarm(alarms, 101) == 1


def test_alarms_are_counted_in_front_of_spikes_and_for_nothing():
    quiet = np.ones((3, 1000), bool)
    quiet[:, :64] = False
    quiet[0, 460:541] = False
    series = np.zeros((3, 1000))
    series[0, [200, 490]] = [2, 3]
    series[1, [480, 700]] = 2
    series[2, 10] = 9
    cases = [Case("x", 0, 500, [1, 2]), Case("x", 2, 900, [1])]
    found = early_warning.alarm_report(cases, {"x": series}, {"x": quiet}, {"x": 1.5})
    assert found == {
        "recall": [1, 2],
        # One of two, and none of one.
        "controls": 0.25,
        "false_per_1000": pytest.approx(1000 * 3 / (3 * 936 - 81)),
        "lead": 10,
    }


# --- the committed result -----------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    return reporting.read("early_warning")


def test_the_result_is_that_of_a_full_run(report):
    assert list(report["rates"]["settings"]) == list(early_warning.SETTINGS)
    assert list(report["spikes"]) == list(early_warning.SPIKING)
    expected = early_warning.rounded(early_warning.header())
    for name in ("rule", "steps", "seeds", "rates_tried"):
        assert report[name] == json.loads(json.dumps(expected[name])), name
    for each in report["rates"]["settings"].values():
        values = np.array(each["held_out_loss"])
        assert values.shape == (len(early_warning.RATES), early_warning.SEEDS)
    for b2, group in early_warning.SPIKING.items():
        runs = len(group) * (early_warning.SPIKE_SEEDS - early_warning.SEEN)
        assert report["spikes"][b2]["runs"] == runs
        assert set(report["spikes"][b2]["precursors"]) == set(early_warning.PRECURSORS)


def test_the_tables_follow_from_the_runs(report):
    settings = report["rates"]["settings"]
    for each in settings.values():
        assert early_warning.rounded(early_warning.rule_report(each)) == each["rule"]
    again = early_warning.rounded(early_warning.compare(settings))
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
    assert auc[early_warning.RHO] > auc["control: the rate itself"]
    assert auc[early_warning.RHO_LATER] == max(auc.values())
    # Stricter, and after the early descent, it is hardly ever wrong.
    strict = rates["limits"][early_warning.RHO_LATER]["-0.2"]
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
