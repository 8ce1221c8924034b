"""Seconds per step, without what is no step."""

from types import SimpleNamespace

import pytest

from optax_stability.loop import _pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(_pace.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_first_step_and_pauses_are_not_counted(clock):
    measured = _pace.Pace()
    assert measured.step() is None  # It compiled.
    clock.now += 2
    assert measured.step() == 2
    clock.now += 2
    measured.pause()
    clock.now += 1000
    assert measured.step() == 2
    clock.now += 4
    assert measured.step() == pytest.approx(0.9 * 2 + 0.1 * 4)


def test_a_clock_that_stands_still_gives_some_speed(clock):
    del clock
    measured = _pace.Pace()
    measured.step()
    assert 0 < measured.step() < 1e-6
