"""Tokens per second, and the share of the device in use where that is known."""

from types import SimpleNamespace

import pace
import pytest


def pretend(monkeypatch, kind, number=1):
    devices = [SimpleNamespace(device_kind=kind)] * number
    monkeypatch.setattr(pace.jax, "devices", lambda: devices)


def test_the_share_in_use_is_of_all_devices(monkeypatch):
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3", 2)
    # 100 tokens per second are 989e12 FLOP/s: all of one device, half of two.
    measured = pace.speed(100, flops_per_token=989e12 / 100)
    assert measured == {
        "perf/tokens_per_second": 100,
        "perf/mfu": pytest.approx(0.5),
    }


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
    assert ("perf/mfu" in pace.speed(10.0, 1.0)) == (peak is not None)
