"""Tokens per second, and the share of the device in use where that is known."""

from types import SimpleNamespace

import pace
import pytest


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)
    return clock


def pretend(monkeypatch, kind, number=1):
    devices = [SimpleNamespace(device_kind=kind)] * number
    monkeypatch.setattr(pace.jax, "devices", lambda: devices)


def test_the_first_step_and_pauses_are_not_counted(clock):
    measured = pace.Pace(tokens_per_step=10, flops_per_token=1.0)
    assert measured.step() == {}  # It compiled.
    clock.now += 2
    assert measured.step() == {"perf/tokens_per_second": 5}
    clock.now += 2
    measured.pause()
    clock.now += 1000
    assert measured.step() == {"perf/tokens_per_second": 5}
    clock.now += 4
    # An average: 0.9 · 2 + 0.1 · 4 seconds.
    assert measured.step()["perf/tokens_per_second"] == pytest.approx(10 / 2.2)


def test_the_share_in_use_is_of_all_devices(clock, monkeypatch):
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3", 2)
    measured = pace.Pace(tokens_per_step=10, flops_per_token=989e12 / 100)
    measured.step()
    clock.now += 0.1
    # 100 tokens per second are 989e12 FLOP/s: all of one device, half of two.
    assert measured.step()["perf/mfu"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_of_some_devices(monkeypatch, kind, peak):
    pretend(monkeypatch, kind)
    assert pace.peak_flops() == peak
    measured = pace.Pace(tokens_per_step=10, flops_per_token=1.0)
    measured.step()
    assert ("perf/mfu" in measured.step()) == (peak is not None)
