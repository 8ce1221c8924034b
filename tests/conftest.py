"""Eight CPU devices, two tiers of tests, and one cache of compiled programs."""

import collections
import gc
import inspect
import os
import time
from pathlib import Path

import jax
import promotion
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
WHOLE_PROGRAMS = {"examples", "interop"}
# All workers together hold the programs of that many tests: some 5 GB.
TESTS_HELD = 600
TESTS_RUN = pytest.StashKey[int]()
# Code generation takes XLA most of its time on a CPU. It is made simple: slower code,
# whose last bit may differ. XLA ends the process at a flag that it does not know.
SIMPLE_CODE = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
KNOWN_TO = (0, 9), (0, 11)
# And not optimized, but in long runs, whose processes compile as those of users do.
UNOPTIMIZED = "jax_disable_most_optimizations"
COMPILES_SIMPLY = pytest.StashKey[bool]()

jax.config.update("jax_num_cpu_devices", 8)
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
    if not hasattr(config, "workerinput"):  # Its workers have its environment.
        forget_old_programs()
        compile_simply()
    config.stash[COMPILES_SIMPLY] = os.environ.get("XLA_FLAGS") == SIMPLE_CODE


def compile_simply():
    """Before JAX starts; whoever sets XLA_FLAGS decides."""
    if KNOWN_TO[0] <= jax.__version_info__ < KNOWN_TO[1]:
        os.environ.setdefault("XLA_FLAGS", SIMPLE_CODE)


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


def pytest_collection_finish():
    """Garbage is looked for less often: it took a quarter of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Every test of the library runs as the strictest users do.

    Trainers do not: they need optax's schedules, which convert, and no test of a run in
    a folder can be repeated there.
    """
    if WHOLE_PROGRAMS & set(pyfuncitem.path.relative_to(CACHE.parents[1]).parts):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    promotion.call(pyfuncitem.obj, arguments)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """How well code is optimized, here and in the processes that a test starts."""
    simple = item.get_closest_marker("long_run") is None
    jax.config.update(UNOPTIMIZED, simple)
    os.environ[UNOPTIMIZED.upper()] = str(simple)
    if item.config.stash[COMPILES_SIMPLY]:
        os.environ["XLA_FLAGS"] = SIMPLE_CODE if simple else ""


@pytest.fixture
def optimized():
    """Optimized code, for bounds that are those of such code."""
    jax.clear_caches()
    jax.config.update(UNOPTIMIZED, False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test counts goes with its report, from any worker."""
    survival.take()  # What a test counted that then failed does not count.
    result = yield
    item.user_properties.extend(survival.take().items())
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """What was compiled stays in the cache on disk."""
    run = item.config.stash[TESTS_RUN] = item.config.stash.get(TESTS_RUN, 0) + 1
    workers = getattr(item.config, "workerinput", {"workercount": 1})["workercount"]
    if run % max(TESTS_HELD // workers, 1) == 0:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """One line for each kind of thing survived; benchmarks/reliability.py reads it."""
    total = collections.Counter()
    for report in terminalreporter.stats.get("passed", ()):
        if report.when == "call":
            for what, times in report.user_properties:
                total[what] += times
    for what, times in sorted(total.items()):
        terminalreporter.write_line(f"{times:,} {what}")
