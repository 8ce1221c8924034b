"""Which deliberate breaks of the library its tests notice.

``mutations.toml`` lists the breaks: a sign, a comparison, a forgotten ``where``, an
off-by-one in a window, a wrong default. Each is applied, one at a time, to a copy of
the repository. Then the tests run until one fails: those of the package that is broken
and its doctests, then those that all packages share; first of the quick tier, then of
the full one. A break that no test notices needs a test.

    python benchmarks/mutations.py                    # all, both tiers
    python benchmarks/mutations.py --quick            # three, quick tier, no JSON
    python benchmarks/mutations.py --only _spikes     # one package, no JSON
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from reporting import Report, finish, markdown, parser

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
# Tests of what all packages promise.
SHARED = ("tests/test_contract.py", "tests/test_shard_map.py", "tests/test_sharding.py")
TIERS = {"quick": (), "full": ("--full", "-m", "full")}
# A break may make a loop endless.
SECONDS = 900
FOR_QUICK = 3
# Exit codes of pytest: passed or none, and what no break should lead to, as an import
# that fails.
PASSED, NOT_RUN = (0, 5), (2, 3, 4)


class Mutation(NamedTuple):
    """One break.

    Attributes:
      package: the one that is broken.
      file: its file.
      what: what is wrong then.
      old: code that is in the file once.
      new: what takes its place.
    """

    package: str
    file: str
    what: str
    old: str
    new: str

    @property
    def path(self) -> Path:
        """The file, from the root of the repository."""
        return Path("optax_stability") / self.package / self.file

    @property
    def tests(self) -> tuple[tuple[str, ...], ...]:
        """What to run, the most likely to notice it first."""
        package = f"tests/{self.package.strip('_')}"
        return (package, str(self.path)), SHARED

    def apply(self, text: str) -> str:
        """The broken text of the file."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.path}: {self.old!r} occurs {text.count(self.old)} times; "
                "give a piece of code that occurs once."
            )
        return text.replace(self.old, self.new)


def read() -> list[Mutation]:
    """All breaks."""
    return [Mutation(**each) for each in tomllib.loads(LIST.read_text())["mutation"]]


def fails(folder: Path, tier: tuple[str, ...], tests: tuple[str, ...]) -> bool:
    """Whether one of the tests of a copy fails, or does not end.

    Raises:
      RuntimeError: pytest could not run them.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tier, *tests]
    # The copy comes before what is installed.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    try:
        ended = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    if ended.returncode in NOT_RUN:
        raise RuntimeError(f"{' '.join(command)}\n{ended.stdout}{ended.stderr}")
    return ended.returncode not in PASSED


def noticed(mutation: Mutation, tiers: Iterable[str]) -> str:
    """The first of these tiers that notices a break, or nothing."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        left_out = shutil.ignore_patterns(".*", "runs", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=left_out)
        # What is compiled is the same but for the break.
        (folder / ".cache").symlink_to(ROOT / ".cache")
        broken = mutation.apply((folder / mutation.path).read_text())
        (folder / mutation.path).write_text(broken)
        for name in tiers:
            if any(fails(folder, TIERS[name], tests) for tests in mutation.tests):
                return name
    return ""


def make_report(mutations: list[Mutation], tiers: Iterable[str]) -> Report:
    """Tries all breaks, two at a time."""
    (ROOT / ".cache").mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = []
        tried = pool.map(lambda each: noticed(each, tiers), mutations)
        for mutation, tier in zip(mutations, tried, strict=True):
            verdict = f"noticed ({tier})" if tier else "NOT NOTICED"
            sys.stdout.write(f"{verdict}: {mutation.path}: {mutation.what}\n")
            sys.stdout.flush()
            found.append(tier)
    return {
        "mutations": [
            {"file": str(each.path), "what": each.what, "noticed": tier}
            for each, tier in zip(mutations, found, strict=True)
        ]
    }


def tables(report: Report) -> dict[str, str]:
    """How many breaks of each package are noticed, by which tier."""
    by_package: dict[str, list[str]] = {}
    for each in report["mutations"]:
        package = f"`{Path(each['file']).parts[1]}`"
        by_package.setdefault(package, []).append(each["noticed"])
    total = [tier for tiers in by_package.values() for tier in tiers]
    rows = [
        [name, str(len(tiers)), str(tiers.count("quick")), str(sum(map(bool, tiers)))]
        for name, tiers in [*by_package.items(), ("all", total)]
    ]
    head = ["package", "breaks", "noticed by `pytest`", "by `pytest --full`"]
    return {"Deliberate breaks": markdown(head, rows)}


def main() -> None:
    """Tries the breaks that are asked for."""
    mutations = read()
    options = parser(__doc__)
    packages = sorted({each.package for each in mutations})
    options.add_argument(
        "--only", nargs="+", choices=packages, help="only these packages"
    )
    flags = options.parse_args()
    if flags.only:
        mutations = [each for each in mutations if each.package in flags.only]
    if flags.quick:
        mutations = mutations[:: len(mutations) // FOR_QUICK][:FOR_QUICK]
    part = flags.quick or bool(flags.only)
    report = make_report(mutations, ["quick"] if flags.quick else list(TIERS))
    finish("mutations", report, tables, quick=part)


if __name__ == "__main__":
    main()
