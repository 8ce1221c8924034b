"""The gallery: its commands, run as they stand there, give the numbers it shows."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import full, long_run

ROOT = Path(__file__).parents[2]
GALLERY = (ROOT / "examples" / "README.md").read_text()
# The text is the sources of Python, which differ by version, and so do the numbers.
TEXTS_DIFFER = 0.1


def run(folder, script, number=0, more=()):
    """Runs a command that the gallery gives for a script; what it printed."""
    commands = re.findall(rf"```sh\npython (examples/{script}.*)\n```", GALLERY)
    path, *flags = *shlex.split(commands[number]), *more
    done = subprocess.run(
        [sys.executable, ROOT / path, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def shown(pattern):
    """A number that the gallery shows."""
    return float(re.search(pattern, GALLERY)[1])


def evaluations(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["eval/loss"] for row in rows if "eval/loss" in row]


@pytest.mark.parametrize(("pattern", "limit"), [("gpt/*.py", 800), ("**/*.py", 2700)])
def test_the_examples_are_short_enough_to_be_read(pattern, limit):
    """What every trainer needs is in the library, and what libraries do is theirs."""
    paths = list((ROOT / "examples").glob(pattern))
    assert paths
    assert sum(len(path.read_text().splitlines()) for path in paths) < limit


@full
@long_run
def test_the_gpt_learns_and_can_be_taught_other_text(tmp_path):
    assert "bits/byte" in run(tmp_path, "gpt/train.py")
    *_, last = evaluations(tmp_path / "runs" / "gpt")
    assert last == pytest.approx(shown(r"held-out loss (\S+) \|"), abs=TEXTS_DIFFER)
    run(tmp_path, "lora_finetune.py")
    before, *_, after = evaluations(tmp_path / "runs" / "lora")
    for found, pattern in (
        (before, r"step   0  held-out loss (\S+)"),
        (after, r"step 200  held-out loss (\S+)"),
    ):
        assert found == pytest.approx(shown(pattern), abs=TEXTS_DIFFER)
    assert after < before - 0.05
    assert (tmp_path / "runs" / "lora" / "merged" / "checkpoints").is_dir()


@full
@long_run
def test_the_broken_run_survives_and_plain_optax_does_not(tmp_path):
    printed = run(tmp_path, "compare.py")
    for row in ("held-out loss at the end", "steps skipped", "rewinds"):
        assert row in printed
    runs = tmp_path / "runs" / "compare"
    *_, ours = evaluations(runs / "skip")
    *_, plain = evaluations(runs / "plain")
    end = shown(r"held-out loss at the end   │ (\S+) ")
    assert ours == pytest.approx(end, abs=TEXTS_DIFFER)
    assert plain is None  # It is not a number.
    rows = list(map(json.loads, (runs / "skip" / "log.jsonl").read_text().splitlines()))
    rewinds = [row for row in rows if "rewind/to" in row]
    assert len(rewinds) == shown(r"rewinds +│ (\d+) ")
    assert 220 < rewinds[0]["rewind/from"] < 240
    skipped = sum(row.get("skip/skipped", 0) for row in rows)
    assert abs(skipped - shown(r"steps skipped +│ (\d+) ")) <= 3
    assert (runs / "compare.png").stat().st_size > 10_000


@full
@long_run
def test_a_branch_is_taken_back_and_nothing_is_rewound(tmp_path):
    printed = run(tmp_path, "compare.py", number=1, more=("--sides", "branch"))
    assert re.search(r"branches taken back +│ 1 ", printed)
    assert re.search(r"rewinds +│ 0 ", printed)
    *_, branch = evaluations(tmp_path / "runs" / "compare" / "branch")
    end = shown(r"held-out loss at the end   │ \S+ +│ (\S+) +│ \S+ +│ \S+ +│")
    assert branch == pytest.approx(end, abs=TEXTS_DIFFER)


@full
@long_run
def test_the_linen_example_prints_what_the_gallery_shows(tmp_path):
    printed = run(tmp_path, "linen_train_state.py")
    losses = dict(re.findall(r"step (\d+)  loss (\S+)", printed))
    assert printed.count("skipped") == 1
    assert math.isnan(float(losses["150"]))
    for step in ("50", "300"):
        expected = shown(rf"step {step}  loss (\S+)")
        assert float(losses[step]) == pytest.approx(expected, abs=2 * TEXTS_DIFFER)


def test_every_example_is_in_the_gallery_and_every_picture_is_there():
    scripts = {path.name for path in (ROOT / "examples").glob("*.ipynb")}
    scripts |= {
        path.name
        for path in (ROOT / "examples").glob("*.py")
        if "def main()" in path.read_text()
    }
    assert scripts | {"train.py", "recipes.py"} <= set(
        re.findall(r"`(?:gpt/)?(\w+\.(?:py|ipynb))`", GALLERY)
    )
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", GALLERY)
    assert pictures
    assert all((ROOT / "examples" / picture).is_file() for picture in pictures)


def test_the_trainer_is_short_enough_to_be_read():
    files = (ROOT / "examples" / "gpt").glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) < 800
