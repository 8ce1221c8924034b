"""Everything the docs claim, measured by one command.

Every suite runs in a process of its own and puts its report into the JSON of the device
that JAX finds; at the end ``tables.py`` writes ``results/<device>.md``, which shows all
tables, and those of the docs. On an accelerator the suites are left out whose numbers
do not depend on the device.

    python benchmarks/run.py            # on two CPU cores some three hours
    python benchmarks/run.py --quick    # each as short as it can be, no JSON
    python benchmarks/run.py --only step_cost growth
"""

import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

from reporting import CPU, parser

TABLES = Path(__file__).with_name("tables.py")
# What they cost, and what they save, on this device.
ON_EVERY_DEVICE = (
    "step_cost",
    "branching",
    "growth",
    "accumulation",
    "noise_scale",
    "trainer_step",
    "stability",
)
# Where nothing is kept, code need not be fast, only be there soon.
SIMPLE_CODE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# What rules do to the same numbers, wherever these are computed.
ANYWHERE = (
    "many_devices",
    "fault_table",
    "spike_detection",
    "low_precision",
    "batch_invariance",
    "diagnosis",
    "early_warning",
    "attention_saturation",
    "noise_truth",
    "noise_norms",
    "clean_cost",
    "reliability",
    "mutations",
)


def device() -> str:
    """What JAX calls the device; asked for elsewhere, since whoever asks keeps it."""
    ask = "import jax; print(jax.devices()[0].device_kind)"
    command = [sys.executable, "-c", ask]
    return subprocess.run(
        command, capture_output=True, check=True, text=True
    ).stdout.strip()


def script_of(suite: str) -> Path:
    """A suite is a file, or a folder with a ``__main__.py``."""
    folder = Path(__file__).with_name(suite)
    return folder if folder.is_dir() else folder.with_suffix(".py")


def run(suite: str, flags: list[str]) -> str:
    """Runs one suite: what went wrong, or nothing."""
    start = time.perf_counter()
    command = [sys.executable, str(script_of(suite)), *flags]
    environment = os.environ | (SIMPLE_CODE if "--quick" in flags else {})
    ended = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, text=True, env=environment
    )
    seconds = time.perf_counter() - start
    # Whole, or what runs beside it would write in between.
    sys.stdout.write(f"\n== {suite}, {seconds:.0f} s\n{ended.stdout}")
    sys.stdout.flush()
    return f"{suite} ended with {ended.returncode}" if ended.returncode else ""


def main() -> None:
    """Runs the suites; fails if one of them does."""
    options = parser(__doc__)
    suites = (*ON_EVERY_DEVICE, *ANYWHERE)
    options.add_argument("--only", nargs="+", choices=suites, help="only these suites")
    flags = options.parse_args()
    here = suites if device() == CPU else ON_EVERY_DEVICE
    quick = ["--quick"] if flags.quick else []
    # Where nothing is kept, times may be what they like.
    with concurrent.futures.ThreadPoolExecutor(2 if flags.quick else 1) as pool:
        ended = pool.map(lambda suite: run(suite, quick), flags.only or here)
        failed = [text for text in ended if text]
    if not flags.quick:
        subprocess.run([sys.executable, str(TABLES)], check=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
