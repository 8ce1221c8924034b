"""Spikes, their controls, and what comes before them, are what they are called."""

import jax.numpy as jnp
import numpy as np
import pytest
from early_warning.spikes import matched_auc
from early_warning.spikes.alarms import (
    JUMPS,
    alarm_report,
    first_alarm,
    jumps_in_health,
)
from early_warning.spikes.cases import (
    Case,
    abnormal_steps,
    cases_of,
    is_clean,
    onsets,
    quiet_steps,
    spiking_steps,
)
from early_warning.spikes.precursors import jump, trailing_mean, z_score
from tiers import full


def abnormal_at(*steps, length=300):
    abnormal = np.zeros(length, bool)
    abnormal[list(steps)] = True
    return abnormal


@full
def test_abnormal_is_half_a_nat_above_the_trend():
    loss = 4 - 0.01 * np.arange(100) + 0.02 * np.sin(np.arange(100))
    higher = loss.copy()
    higher[[50, 70, 90]] += [0.6, 0.4, np.nan]
    abnormal = abnormal_steps(jnp.array([loss, higher]))
    assert np.argwhere(abnormal).tolist() == [[1, 50], [1, 90]]


def test_one_hard_batch_is_no_spike():
    def spiking(*steps):
        return np.flatnonzero(spiking_steps(abnormal_at(*steps))).tolist()

    assert spiking(100, 104, 120, 298, 299) == [100, 104, 298, 299]
    assert spiking(100, 105) == []


def test_a_spike_comes_after_quiet_steps():
    def found(*steps):
        return onsets(abnormal_at(*steps))

    assert found(100, 101, 141, 142, 182, 183) == [100]
    assert found(100, 101, 142, 143) == [100, 142]
    assert found(40, 41) == []


def test_a_clean_spike_has_no_abnormal_loss_before():
    case = Case("x", 1, 150, [0])
    for step, expected in ((109, True), (110, False), (149, False), (150, True)):
        abnormal = np.stack([abnormal_at(130), abnormal_at(step)])
        assert is_clean(case, abnormal) == expected


def test_quiet_is_neither_before_nor_after():
    quiet = quiet_steps(abnormal_at(150))
    expected = [*range(64, 120), *range(191, 300)]
    assert np.flatnonzero(quiet).tolist() == expected


def test_z_scores_are_of_the_steps_before():
    series = np.tile([0.0, 2.0], 40)[None]
    series[0, 50] = 9
    z = z_score(series)
    # Median 1, median deviation 1.
    np.testing.assert_allclose(z[0, 50], 8 / 1.4826)
    np.testing.assert_allclose(np.abs(z[0, 32:50]), 1 / 1.4826)
    assert not z[0, :32].any()


def test_a_jump_is_relative_to_the_median_of_the_past():
    series = np.tile([1.0, 3.0], 40)[None]
    series[0, 50] = 8
    ratio = jump(series)
    assert ratio[0, [10, 31, 50]].tolist() == [0, 0, 4]
    # Of the 32 before, 15 are now 1, and the median is 3.
    assert ratio[0, 51] == 1
    assert jumps_in_health(np.ones((3, 70)), np.array([1, 1, 0]) > 0) == [
        *[0] * len(JUMPS),
        2 * 6,
    ]


def test_trailing_means_end_with_the_step():
    means = trailing_mean(np.arange(20.0), window=4)
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
    assert cases_of("x", spiking) == [
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
    wins = matched_auc.wins_of(case, series, last=1)
    np.testing.assert_array_equal(wins, [np.nan, 1, 0.5, np.nan])
    # Without the last four steps, 146 to 149, all that is left is run 1.
    wins = matched_auc.wins_of(case, series, last=5)
    np.testing.assert_array_equal(wins, [np.nan, 0, 0.5, np.nan])


def test_each_spike_counts_once_however_many_controls():
    nan = np.nan
    wins = np.array([[nan, 1, 0, 0, 0], [nan, 1, nan, nan, nan]])
    runs = np.array([0, 0])
    auc = matched_auc.matched_auc
    assert auc(wins, np.ones(5), runs) == (0.25 + 1) / 2
    assert auc(wins, np.array([2, 1, 1, 0, 0]), runs) == (0.5 + 1) / 2
    # A spike whose controls were not drawn does not count.
    assert auc(wins, np.array([1, 0, 1, 1, 1]), runs) == 0


def matched(cases, series, last):
    wins = matched_auc.all_wins(cases, series, last)
    return matched_auc.matched(cases, series, wins)


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
    assert first_alarm(alarms, 100) is None
    assert first_alarm(alarms, 99) == 30
    assert first_alarm(alarms, 101) == 1


def test_alarms_are_counted_in_front_of_spikes_and_for_nothing():
    quiet = np.ones((3, 1000), bool)
    quiet[:, :64] = False
    quiet[0, 460:541] = False
    series = np.zeros((3, 1000))
    series[0, [200, 490]] = [2, 3]
    series[1, [480, 700]] = 2
    series[2, 10] = 9
    cases = [Case("x", 0, 500, [1, 2]), Case("x", 2, 900, [1])]
    found = alarm_report(cases, {"x": series}, {"x": quiet}, {"x": 1.5})
    assert found == {
        "recall": [1, 2],
        # One of two, and none of one.
        "controls": 0.25,
        "false_per_1000": pytest.approx(1000 * 3 / (3 * 936 - 81)),
        "lead": 10,
    }
