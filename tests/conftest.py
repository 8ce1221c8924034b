"""Eight CPU devices, so that every test can shard; the examples are importable."""

import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gpt"))
