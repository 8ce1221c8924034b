"""What people do to a trainer, and what it must answer: whole runs, from outside.

The parts are tested where they are; here, that they are put together.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import survival
from tiers import full

SMALL_GPT = Path(__file__).parent / "small_gpt.py"
ROOT = Path(__file__).parents[2]
SMALL = """--batch-size 8 --microbatches 2 --eval-batches 1 --sample-tokens 0
--checkpoint-every 4 --eval-every 6 --log-every 2"""
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),  # With the examples.
}
pytestmark = [full, pytest.mark.xdist_group("trainer cases")]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    lines = (f"def f{i}(x):\n    return x + {i}\n\n" for i in range(900))
    path.write_text("".join(lines))
    return path


def command(folder, *flags):
    data = ["--data", folder / "text.txt", "--out", folder / "out"]
    return [sys.executable, SMALL_GPT, *data, *SMALL.split(), *map(str, flags)]


def train(folder, *flags, **environment):
    """A run to its end; what it printed, together."""
    done = subprocess.run(
        command(folder, *flags),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=ENVIRONMENT | environment,
        check=False,
        timeout=500,
    )
    assert "Traceback" not in done.stderr, done.stderr
    done.said = done.stdout + done.stderr
    return done


def train_well(folder, *flags, **environment):
    done = train(folder, *flags, **environment)
    assert done.returncode == 0, done.said
    return done


def rows(folder):
    lines = (folder / "out" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def course(folder):
    return [
        {key: x for key, x in row.items() if not key.startswith("perf/")}
        for row in rows(folder)
    ]


def test_a_damaged_newest_checkpoint_costs_a_few_steps(tmp_path, text):
    del text
    train_well(tmp_path, "--steps", 12)
    whole = course(tmp_path)
    checkpoints = tmp_path / "out" / "checkpoints"
    files = [path for path in (checkpoints / "12").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    done = train_well(tmp_path, "--steps", 12)
    (note,) = [line for line in done.said.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: checkpoint 12 is damaged: state/")
    assert note.endswith(f"it is kept in {tmp_path}/out/checkpoints-damaged/12")
    assert "is at step 8: resuming from there" in done.stdout
    assert course(tmp_path) == whole
    # Its progress, which is read first; and a log with lines that are none.
    for path in (checkpoints / "12" / "metrics").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    log = tmp_path / "out" / "log.jsonl"
    first, second, *others = log.read_text().splitlines()
    log.write_text("\n".join([first, second[:40], "", "\0" * 60, *others, '{"st']))
    done = train_well(tmp_path, "--steps", 12)
    assert "is at step 8: resuming" in done.stdout
    assert "left out 3 lines that are no row in JSON" in done.stderr
    assert course(tmp_path) == whole[:1] + whole[2:]


def test_two_processes_do_not_train_in_one_folder(tmp_path, text):
    del text
    first = subprocess.Popen(
        command(tmp_path, "--steps", 100_000),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    with first:
        try:
            while not (tmp_path / "out" / "checkpoints" / "4").exists():
                assert first.poll() is None
                time.sleep(0.2)
            second = train(tmp_path, "--steps", 100_000)
            assert second.returncode == 2
            says = "error: --out: another process is training in "
            assert second.stderr.startswith(f"{says}{tmp_path / 'out'} (process ")
            assert f"(process {first.pid} on " in second.stderr
        finally:
            first.send_signal(signal.SIGTERM)
            first.wait(100)
    steps = [row["step"] for row in rows(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_ends_in_nan_is_no_success(tmp_path, text):
    del text
    flags = ("--baseline", "--inject", "nan@12", "--steps", 30, "--eval-every", 30)
    for _ in range(2):  # Also when it is asked again.
        done = train(tmp_path, *flags)
        assert done.returncode == 1
        assert "error: the run ends with a held-out loss that is not finite" in (
            done.stderr
        )
        assert "nonfinite at step" in done.stdout
        steps = [x for x in done.stdout.splitlines() if x.startswith("step  30  loss")]
        assert all("not finite for 19 steps" in line for line in steps)


def test_trouble_that_lasts_ends_the_run(tmp_path, text):
    """Corruption for good: back up to three times, and then a stop with an error."""
    del text
    back = ("--rewind-steps", 20, "--skip-batches", 20, "--learning-rate", 0.01)
    done = train(tmp_path, "--inject", "bytes@80x100000", "--steps", 400, *back)
    assert done.said.count("back to step") == 3
    assert done.returncode == 1
    assert "error: loss is at" in done.stderr
    assert "after 3 rewinds" in done.stderr


def test_output_that_cannot_show_an_arrow_does_not_end_a_run(tmp_path, text):
    del text
    done = train_well(tmp_path, "--steps", 6, PYTHONIOENCODING="cp1252")
    assert "grad" in done.stdout


def test_a_wrong_bit_is_found_at_the_first_verified_step(tmp_path, text):
    del text
    flags = ("--steps", 8, "--verify-every", 4)
    done = train_well(tmp_path, *flags, "--inject", "flip@4")
    (says,) = [x for x in done.stdout.splitlines() if "wrong numbers" in x]
    assert "state/arrays/" in says
    found = [x["verify/differs"] for x in rows(tmp_path) if "verify/differs" in x]
    assert found == [1, 0]
    # The step was repeated: the course is that of a machine without the fault.
    expected = tmp_path / "expected"
    expected.mkdir()
    (expected / "text.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    train_well(expected, *flags, "--inject", "flip@99")
    assert [row.get("loss") for row in rows(expected)] == [
        row.get("loss") for row in rows(tmp_path)
    ]


def test_what_was_skipped_is_shown_and_rechecked(tmp_path, text):
    flags = ("--steps", 60, "--inject", "nan@20", "bytes@50")
    done = train_well(tmp_path, *flags)
    found = {x["recheck/step"]: x for x in rows(tmp_path) if "recheck/step" in x}
    assert {step: x["recheck/verdict"] for step, x in found.items()} == {20: 0, 50: 1}
    assert "the machine, and the batch is trained on after all" in done.stdout
    kept = (tmp_path / "out" / "flagged" / "step_20.txt").read_text()
    window = kept.split("────")[1]
    offset = int(window.partition("byte ")[2].split("\n")[0])
    assert window.partition("\n")[2].strip() in text.read_text()[offset : offset + 40]
    assert "the data" in (tmp_path / "out" / "flagged" / "step_50.txt").read_text()
    assert "recheck/origin" in found[20]


def test_kills_while_it_starts_or_compiles_lose_nothing(tmp_path, text):
    """Before the first step is done there may be nothing, and never half of it.

    Each run starts on what the one before has left.
    """
    del text
    for seconds in (1, 3, 5, 8):
        with subprocess.Popen(
            command(tmp_path, "--steps", 8),
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
            start_new_session=True,
        ) as process:
            time.sleep(seconds)
            process.kill()
        survival.count(survival.KILLS)
    train_well(tmp_path, "--steps", 8)
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [*range(1, 9)]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path, text):
    del text
    python, *line = command(tmp_path, "--steps", 8)
    # The state takes more than this, and every other file less.
    limited = [python, "-c", LIMITED, "100000", *map(str, line)]
    done = subprocess.run(
        limited, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    notes = [x for x in done.stderr.splitlines() if x.startswith("note: checkpoint")]
    assert all(" could not be saved: File too large; those be" in x for x in notes)
    assert notes
    assert done.stderr.splitlines()[-1].startswith("error: step 8 could not be saved")
    train_well(tmp_path, "--steps", 8)
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert len(losses) == 8
    assert np.isfinite(losses).all()
