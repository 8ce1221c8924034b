"""Eight CPU devices, so that every test can shard; the examples are importable."""

import sys
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "gpt")]


@pytest.fixture(scope="session", autouse=True)
def programs_are_compiled_once(tmp_path_factory, worker_id):
    """What takes more than a second to compile is shared by all workers of this run."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
