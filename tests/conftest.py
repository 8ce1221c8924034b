"""Eight CPU devices, so that every test can shard; the examples are importable."""

import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "gpt")]
