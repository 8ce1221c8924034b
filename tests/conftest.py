"""Eight CPU devices, so that every test can shard; the examples are importable."""

import collections

import jax
import pytest
import survival

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def programs_are_compiled_once(tmp_path_factory, worker_id):
    """What takes more than a second to compile is shared by all workers of this run."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))


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
