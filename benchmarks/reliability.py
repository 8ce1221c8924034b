"""How much the test suite breaks on purpose and sees go on.

Runs the tests, but for those of the benchmarks, and keeps what they count: fault
sequences after which everything is finite and learns again, kills after which a run
takes the same course as if nobody had killed it, stops by a signal that were gone on
from, restored states that equal the saved ones.

    python benchmarks/reliability.py            # as long as pytest --full
    python benchmarks/reliability.py --quick    # restored states alone, no JSON
"""

import re
import subprocess
import sys
from pathlib import Path

from reporting import Report, markdown, run_suite

ROOT = Path(__file__).parents[1]
QUICK = ("tests/test_contract.py", "-k", "orbax and accumulate")
# Of the transformations as of the examples: all but the tests of what is told here.
ALL = ("--full", "--ignore=tests/benchmarks")


def make_report(quick: bool) -> Report:
    """What the suites print at their end."""
    command = [sys.executable, "-m", "pytest", *(QUICK if quick else ALL)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=False, text=True
    )
    if ended.returncode:
        sys.exit(ended.stdout[-4000:])
    lines = re.findall(r"^([\d,]+) ([a-z][a-z ]+)$", ended.stdout, re.MULTILINE)
    (passed,) = re.findall(r"(\d+) passed", ended.stdout)
    counted = {what: int(times.replace(",", "")) for times, what in lines}
    return {"counted": counted | {"tests passed": int(passed)}}


def tables(report: Report) -> dict[str, str]:
    """What was counted."""
    rows = [[what, f"{times:,}"] for what, times in report["counted"].items()]
    return {"Survived": markdown(["what", "how many"], rows)}


if __name__ == "__main__":
    run_suite("reliability", __doc__, make_report, tables)
