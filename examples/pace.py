"""How fast a run is: tokens per second, and the share of the device in use."""

import re
import time

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


class Pace:
    """Average speed over the last steps; pauses for other work are left out."""

    def __init__(self, tokens_per_step: int, flops_per_token: float):
        """Starts without an average: the first step compiles, and is not counted."""
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._peak = peak_flops()
        self._last: float | None = None
        self.seconds_per_step: float | None = None

    def pause(self) -> None:
        """Leaves out the time from here to the next step."""
        self._last = None

    def step(self) -> dict[str, float]:
        """Counts a finished step; returns the speed by metric name, if known."""
        now = time.perf_counter()
        if self._last is not None:
            # At least something: a coarse clock may stand still.
            took, before = max(now - self._last, 1e-9), self.seconds_per_step
            self.seconds_per_step = (
                took if before is None else 0.9 * before + 0.1 * took
            )
        self._last = now
        if self.seconds_per_step is None:
            return {}
        speed = self._tokens / self.seconds_per_step
        known = {"perf/tokens_per_second": speed}
        if self._peak is not None:
            known["perf/mfu"] = speed * self._flops / self._peak
        return known
