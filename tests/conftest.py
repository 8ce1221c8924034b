"""Eight CPU devices, two tiers of tests, and one cache of compiled programs."""

import collections
import os
import time
from pathlib import Path

import jax
import pytest
import survival
import tiers

# Most of the time of a test is compilation: programs are kept between runs, and shared
# by all workers and by the processes that tests start.
CACHE = Path(__file__).parents[1] / ".cache" / "xla"
CACHE_OPTIONS = {
    "jax_compilation_cache_dir": str(CACHE),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
DAYS_KEPT = 30
# Code generation is most of the time of XLA on a CPU, and changes no operation: here it
# is the simplest. XLA ends the process at a flag that it does not know.
FAST_TO_COMPILE = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
)
KNOWN_TO = (0, 9), (0, 11)

jax.config.update("jax_num_cpu_devices", 8)
if KNOWN_TO[0] <= jax.__version_info__ < KNOWN_TO[1]:
    os.environ.setdefault("XLA_FLAGS", FAST_TO_COMPILE)
for name, value in CACHE_OPTIONS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="run all tests, not the quick tier alone"
    )


def pytest_configure(config):
    for marker in tiers.MARKERS:
        config.addinivalue_line("markers", marker)
    if not hasattr(config, "workerinput"):
        forget_old_programs()


def forget_old_programs():
    """The cache does not grow for ever."""
    for program in CACHE.glob("*"):
        if time.time() - program.stat().st_mtime > DAYS_KEPT * 24 * 3600:
            program.unlink(missing_ok=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The quick tier, unless all is asked for, or a test by its name."""
    if any("::" in argument for argument in config.args):
        return
    tiers.mark(items)
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[x for x in items if not tiers.is_quick(x)])
        items[:] = filter(tiers.is_quick, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test counts goes with its report, from any worker."""
    survival.take()  # What a test counted that then failed does not count.
    result = yield
    item.user_properties.extend(survival.take().items())
    return result


def pytest_terminal_summary(terminalreporter):
    """One line for each kind of thing survived; benchmarks/reliability.py reads it."""
    total = collections.Counter()
    for report in terminalreporter.stats.get("passed", ()):
        if report.when == "call":
            for what, times in report.user_properties:
                total[what] += times
    for what, times in sorted(total.items()):
        terminalreporter.write_line(f"{times:,} {what}")
