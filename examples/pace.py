"""How fast a run is: tokens per second, and the share of the device in use."""

import re

import jax

# Dense bfloat16 FLOP/s of one device, by the first words of its name in JAX.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None if it is not known."""
    device, *others = jax.devices()
    for name, peak in PEAKS.items():
        # Whole words only: "NVIDIA L4" is not "NVIDIA L40S".
        if re.match(rf"{name}\b", device.device_kind):
            return peak * (1 + len(others))
    return None


def speed(tokens_per_second: float, flops_per_token: float) -> dict[str, float]:
    """The speed by metric name, as far as it is known."""
    peak, known = peak_flops(), {"perf/tokens_per_second": tokens_per_second}
    if peak is not None:
        known["perf/mfu"] = tokens_per_second * flops_per_token / peak
    return known
