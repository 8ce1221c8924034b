"""What counts as bad, as an alarm and as a lead, on runs made by hand."""

import attention_saturation as suite
import numpy as np
import pytest

STEPS = 60


def run(end, loss, logit, bound=1.0):
    flat = np.ones(STEPS)
    return suite.Run(end, loss * flat, logit * flat, bound * flat)


def jumps(at, low, high):
    return np.where(np.arange(STEPS) < at, low, high)


@pytest.mark.parametrize(
    ("flags", "known"), [("0110", None), ("0111", 1), ("110111", 3), ("", None)]
)
def test_an_alarm_is_three_in_a_row(flags, known):
    assert suite.first(np.array([x == "1" for x in flags], bool), 3) == known


def test_behind_is_until_the_end():
    control = np.full(STEPS, 2.0)
    late = np.where(np.arange(STEPS) < 30, 2.0, 3.0)
    found = suite.behind_from(late, control)
    assert found is not None
    assert 30 < found <= 30 + suite.SMOOTH
    assert suite.behind_from(late[::-1], control) is None
    assert suite.behind_from(control, control) is None


def test_bad_are_higher_rates_that_end_behind_and_good_are_all_others():
    found = {
        (1e-3, 0): run(2.6, 2.6, 5.0),  # Slow, and not bad.
        (1e-2, 0): run(2.0, 2.0, 5.0),
        (3e-2, 0): run(2.05, 2.05, 60.0),  # A false alarm.
        (1e-1, 0): run(3.0, jumps(30, 2.0, 3.0), jumps(10, 5.0, 80.0), 300.0),
        (3e-1, 0): run(np.nan, 3.0, 5.0),  # Missed.
    }
    rates = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    counts = suite.alarms(found, rates)
    assert counts["logit"]["bad"] == [1, 2]
    assert counts["logit"]["good"] == [1, 3]
    (lead,) = counts["logit"]["lead"]
    assert 30 - 12 < lead <= 30 - 12 + suite.SMOOTH
    assert counts["bound"]["bad"] == [1, 2]
    assert counts["bound"]["good"] == [0, 3]


def test_a_logit_above_its_bound_is_counted():
    assert suite.violations({(1e-3, 0): run(2.0, 2.0, 5.0, bound=4.0)}) == [60, 60]
    assert suite.violations({(1e-3, 0): run(2.0, 2.0, 5.0, bound=6.0)}) == [0, 60]


def test_the_tables_and_the_picture_show_every_setting():
    rates = (1e-2, 1e-1)
    found = {
        (1e-2, 0): run(2.0, 2.0, 5.0, 20.0),
        (1e-1, 0): run(3.0, jumps(30, 2.0, 3.0), jumps(10, 5.0, 80.0), 300.0),
    }
    row = {
        "rates": list(rates),
        "plain": suite.ends(found, rates),
        "qk_norm": [2.0, 2.5],
        "logit": [5.0, 80.0],
        "alarms": suite.alarms(found, rates),
        "above_bound": suite.violations(found),
    }
    report = {"settings": {"small": row, "large": row}}
    losses, alarms = suite.tables(report).values()
    assert "| small, plain | 2.000 | 3.000 |" in losses
    assert "| large, qk-norm | 2.000 | 2.500 |" in losses
    assert "| small, logit | 1 of 1 | 0 of 1 |" in alarms
    assert suite.picture(report).startswith(b"\x89PNG")
