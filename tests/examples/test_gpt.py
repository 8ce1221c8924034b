"""The GPT trainer, as its users run it."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import chex
import console
import data
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import survival
import train
import training
from config import check
from flax import nnx
from inputs import InputError
from tiers import full, quick_only

import optax_stability as ost
from optax_stability.loop import DivergedError, Drawn
from optax_stability.orbax import Checkpoints

# What costs much to make is made in one worker.
pytestmark = pytest.mark.xdist_group("gpt")

SCRIPT = Path(__file__).parents[2] / "examples" / "gpt" / "train.py"
SMALL_GPT = Path(__file__).parent / "small_gpt.py"
# Eight devices share a batch of eight; few steps, for only the wiring is tested here.
QUICK = {
    "steps": 4,
    "warmup_steps": 2,
    "batch_size": 8,
    "eval_every": 4,
    "eval_batches": 1,
    "sample_tokens": 0,
}
NOISE = ("noise_scale/b_simple", "noise_scale/low", "noise_scale/high")
# Of eight windows in four microbatches, for a tree of one leaf.
MOMENTS = ost.Moments(
    num_microbatches=jnp.int32(4),
    weight=jnp.float32(8),
    deviation=jnp.ones(1),
    mean_square=None,
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 400)
    return path


@pytest.fixture
def small(monkeypatch):
    """A model that compiles in a moment, under the name of the default."""
    monkeypatch.setitem(model.SIZES, "tiny", model.Size(1, 16, 2, 16, 256, 1e-2))


def read_rows(folder):
    return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]


def read_log(folder):
    rows = read_rows(folder)
    return [x for x in rows if "loss" in x], [x for x in rows if "eval/loss" in x]


def without_times(rows):
    return [{k: x for k, x in row.items() if "perf/" not in k} for row in rows]


def newest_state(folder):
    """All arrays of the newest checkpoint."""
    with Checkpoints(folder / "checkpoints") as saved:
        return saved.load(saved.available()[0])


def command(folder, text, flags, script=SCRIPT):
    return [sys.executable, script, *flags.split(), "--data", text, "--out", folder]


@full
def test_one_command_trains_and_leaves_a_log_and_a_picture(tmp_path, text):
    flags = (
        "--steps 12 --warmup-steps 2 --eval-batches 1 --sample-tokens 8 --log-every 4"
    )
    done = subprocess.run(
        command(tmp_path, text, flags), capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout  # Not a terminal: no control characters.
    for shown in ("step   8", "grad", "limit", "tok/s", "bits/byte", "To be"):
        assert shown in done.stdout
    assert re.search(r"noise \d+(\.\d)? \(\d+(\.\d)?–\d+(\.\d)?\)", done.stdout)
    assert re.search(
        r"\nB_simple now = .* examples \(95 %: .*\), worth \d+ steps", done.stdout
    )
    rows, evaluations = read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(256), abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    # A share of the first norm.
    assert rows[0]["clip/limit"] == pytest.approx(rows[0]["grad/norm"] / 32)
    assert evaluations[0]["eval/bits"] == pytest.approx(8, abs=1e-4)
    assert evaluations[-1]["eval/bits"] < 8
    assert rows[1]["noise_scale/b_simple"] == 0  # Two steps have no variance.
    for row in rows[-4:]:
        scale, low, high = (row[key] for key in NOISE)
        assert 0 < low < scale < high
        assert 0 < row["noise_scale/noise_to_weight"] < 1
        assert row["perf/tokens_per_second"] > 0
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    for tag in ("noise_scale/b_simple", "noise_scale/low", "loss", "eval/loss"):
        assert written.count(b"\n" + bytes([len(tag)]) + tag.encode()) == (
            2 if tag == "eval/loss" else sum(row[tag] is not None for row in rows)
        )
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "No finding" in (tmp_path / "report.html").read_text()


@full
def test_a_run_that_is_killed_takes_the_same_course(tmp_path, text):
    flags = "--steps 30 --warmup-steps 2 --eval-batches 1 --sample-tokens 0"
    flags += " --checkpoint-every 4 --eval-every 10 --inject nan@14 scale@20"

    def start(folder):
        line = command(folder, text, flags, SMALL_GPT)
        paths = os.pathsep.join(sys.path)  # With the examples.
        return subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )

    def kill_at(step, folder):
        """Kills the process without a warning as soon as it has logged the step."""
        process = start(folder)
        while not folder.joinpath("log.jsonl").is_file() or not any(
            row["step"] == step for row in read_whole_rows(folder)
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()

    def run(folder):
        process = start(folder)
        printed = process.communicate()[0]
        assert process.returncode == 0
        return printed

    run(tmp_path / "whole")
    kill_at(17, tmp_path / "torn")
    assert "resuming from there" in run(tmp_path / "torn")
    logs = [without_times(read_rows(tmp_path / x)) for x in ("whole", "torn")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if "loss" in row] == list(range(1, 31))
    chex.assert_trees_all_equal(
        *(newest_state(tmp_path / x) for x in ("whole", "torn"))
    )
    survival.count(survival.KILLS)


def read_whole_rows(folder):
    """The rows of a file that is being written to."""
    *lines, _ = (folder / "log.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines]


@pytest.mark.usefixtures("small")
@full
def test_a_surge_of_the_learning_rate_is_undone(tmp_path, text):
    settings = QUICK | {"steps": 80, "eval_every": 20, "checkpoint_every": 20}
    settings |= {"rewind_steps": 10, "skip_batches": 40, "inject": ("surge=100@61x12",)}
    row = train.train(train.Config(data=text, out=tmp_path, **settings))
    rows, evaluations = read_log(tmp_path)
    # As good as before, and not as after the surge.
    assert row["eval/loss"] < min(x["eval/loss"] for x in evaluations) + 0.1
    (rewind,) = (row for row in read_rows(tmp_path) if "rewind/to" in row)
    assert rewind["rewind/to"] == 40
    assert 61 < rewind["rewind/from"] < 90
    after = [row for row in rows if row["batch"] > rewind["rewind/from"]]
    assert [row["step"] for row in after] == list(range(41, 81))
    # Not one batch that was seen comes again.
    batches = [row["batch"] for row in rows]
    assert batches == sorted(set(batches))
    kept = ost.read_log(tmp_path / "log.jsonl")
    np.testing.assert_array_equal(kept["step"], np.arange(81))


@pytest.mark.usefixtures("small")
@full
def test_the_baseline_is_optax_alone_and_to_end_in_nan_is_to_fail(
    tmp_path, text, capsys
):
    settings = QUICK | {"steps": 8, "inject": ("nan@5",), "baseline": True}
    with pytest.raises(DivergedError, match="a held-out loss that is not finite"):
        train.train(train.Config(data=text, out=tmp_path, **settings))
    assert "nonfinite at step 5" in capsys.readouterr().out
    rows, evaluations = read_log(tmp_path)
    assert [row["loss"] is None for row in rows] == [False] * 4 + [True] * 4
    assert evaluations[-1]["eval/loss"] is None
    state = training.make_optimizer(train.Config(baseline=True)).init(jnp.ones(2))
    assert all(type(x).__module__.startswith("optax.") for x in (state[0], state[1][0]))


@pytest.mark.usefixtures("small")
@full
def test_half_precision_learns_and_its_scale_is_logged(tmp_path, text):
    settings = QUICK | {"steps": 12, "eval_every": 12, "dtype": "float16"}
    row = train.train(train.Config(data=text, out=tmp_path, **settings))
    assert row["eval/loss"] < 5.3
    assert {row["loss_scale"] for row in read_log(tmp_path)[0]} == {2.0**16}


@full
@pytest.mark.usefixtures("small")
def test_a_healthy_run_makes_no_nan(tmp_path, text):
    with jax.debug_nans(True):
        train.train(train.Config(data=text, out=tmp_path, **QUICK))


@pytest.mark.usefixtures("small")
@full
def test_the_penalty_is_part_of_the_loss(tmp_path, text):
    flags = QUICK | {"gradient_penalty": 0.5, "eval_batches": 4}
    row = train.train(train.Config(data=text, out=tmp_path, **flags))
    first = read_log(tmp_path)[0][0]
    # All tokens are equally likely then, and the rest is the penalty.
    assert first["loss"] > math.log(256) + 0.05
    assert row["eval/loss"] < row["loss"] - 0.05  # Evaluations go without.


@pytest.mark.usefixtures("small")
@full
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, text, monkeypatch, capsys):
    step, pressed = train.Run.advance, []

    def press(run, drawn):
        if drawn.step == 3 and not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return step(run, drawn)

    config = train.Config(data=text, out=tmp_path, **QUICK)
    monkeypatch.setattr(train.Run, "advance", press)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    says = "SIGINT: saved at step 3; the same command resumes the run"
    assert says in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    train.train(config)
    assert "is at step 3: resuming" in capsys.readouterr().out
    assert [row["step"] for row in read_log(tmp_path)[0]] == [1, 2, 3, 4]


@full
def test_clipping_can_wait_for_the_end_of_the_warm_up():
    config = train.Config(steps=40, warmup_steps=8, clip_after_warmup=True)
    tx = training.make_optimizer(config)
    params = {"w": jnp.ones((2, 2))}
    extra = {"value": 1.0, "moments": MOMENTS}
    step = jax.jit(lambda state: tx.update(params, state, params, **extra)[1])
    state, limits = tx.init(params), []
    for _ in range(34):
        state = step(state)
        limits.append(float(ost.metrics(state)["clip/limit"]))
    # The first limit is a share of the first norm, and that is the one of step 8.
    armed = [0 < limit < math.inf for limit in limits]
    assert armed.index(True) == 8


@pytest.mark.parametrize("on_spike", ["skip", "branch", "rewind"])
@full
def test_the_guard_leaves_out_a_step_whose_loss_is_not_finite(on_spike):
    config, guard = train.Config(on_spike=on_spike), on_spike != "rewind"
    tx = training.make_optimizer(config)
    params = {"w": jnp.ones((2, 2))}
    extra = {"value": jnp.nan, "moments": MOMENTS}
    updates, state = tx.update(params, tx.init(params), params, **extra)
    assert bool((updates["w"] == 0).all()) == guard
    assert ("skip/total" in ost.metrics(state)) == guard
    assert float(ost.metrics(state)["grad/norm"]) == 2.0
    assert ost.noise_scale(state).steps == (0 if guard else 1)


@pytest.mark.parametrize("level", [None, 5.0])
@pytest.mark.parametrize("late", [True, False])
@quick_only("False-None", "False-5.0", "True-None")
def test_there_is_one_noise_scale(level, late):
    config = train.Config(clip_when_noisy=level, clip_after_warmup=late)
    state = training.make_optimizer(config).init({"w": jnp.ones(2)})
    assert ost.noise_scale(state).steps == 0
    assert ("when_noisy/active" in ost.metrics(state)) == (level is not None)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("level", "switches_on"), [(0.0, True), (1e9, False)])
@full
def test_the_clip_can_wait_for_noise(tmp_path, text, level, switches_on):
    settings = QUICK | {"steps": 30, "eval_every": 30, "batch_size": 16}
    settings |= {"microbatches": 2, "on_spike": "rewind", "clip_when_noisy": level}
    train.train(train.Config(data=text, out=tmp_path, **settings))
    rows, _ = read_log(tmp_path)
    active = [row["when_noisy/active"] for row in rows]
    assert active[:2] == [0, 0]  # Nothing is known of the noise yet.
    assert active[-1] == switches_on
    # From the 26th step on the clip itself has a limit; while off, it has none.
    assert (rows[-1]["clip/limit"] is not None) == switches_on


@pytest.mark.usefixtures("small")
@full
def test_a_crash_leaves_a_report(tmp_path, text, monkeypatch):
    step = train.Run.advance

    def step_until_the_power_fails(run, drawn):
        if drawn.step == 4:
            raise MemoryError
        return step(run, drawn)

    monkeypatch.setattr(train.Run, "advance", step_until_the_power_fails)
    with pytest.raises(MemoryError):
        train.train(train.Config(data=text, out=tmp_path, **QUICK))
    report = (tmp_path / "report.html").read_text()
    assert "GPT tiny" in report
    assert "Steps 1" in report or "steps 1" in report


@pytest.mark.usefixtures("small")
@full
def test_histograms_of_every_layer_go_to_tensorboard(tmp_path, text):
    settings = QUICK | {"steps": 8, "histogram_every": 5}
    train.train(train.Config(data=text, out=tmp_path, **settings))
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    # After steps 1 and 6; before the first, the head is 0 and hides the embedding.
    assert written.count(b"grad/histogram (log2)") == 2
    assert written.count(b"grad/histogram/tokens/embedding (log2)") == 1


def noise(scale, low, high):
    return dict(zip(NOISE, (scale, low, high), strict=True))


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (noise(412.3, 350.1, 505.0), "noise 412 (350–505)"),
        (noise(1234.0, 0.0, 45678.0), "noise 1.2k (0.0–45.7k)"),
        (noise(0.0, 350.1, math.inf), "noise ≥ 350"),
        (noise(math.nan, 350.1, math.inf), "noise ≥ 350"),
        (noise(0.0, 0.0, math.inf), "noise –"),
        (noise(math.nan, 0.0, math.inf), "noise –"),
    ],
)
def test_the_line_says_what_is_known_of_the_noise(row, shown):
    assert console._noise(row) == shown


def screen_of(rows, log_every, before=None):
    """Writes rows to a screen that is no terminal."""
    row = noise(math.nan, 0.0, math.inf) | {"learning_rate": 0.1, "grad/norm": 1.0}
    row |= {"clip/limit": math.inf, "skip/skipped": 0, "skip/total": 0}
    with closing(console.Screen(len(rows), log_every, "byte", before)) as screen:
        for step, each in enumerate(rows, start=1):
            screen.write(step, row | {"tokens": 8 * step} | each)


def test_the_line_counts_what_was_clipped(capsys):
    seen = [(2.0, 1.0, 0), (2.0, 1.0, 1), (2.0, math.inf, 0), (1.5, 1.0, 0)]
    keys = ("grad/norm", "clip/limit", "skip/skipped")
    rows = [dict(zip(keys, each, strict=True)) for each in seen]
    rows = [row | {"loss": 1.0, "skip/total": 1} for row in rows]
    screen_of(rows, log_every=4)
    line = capsys.readouterr().out
    expected = "step   4  loss 1.000 val –  lr 1.0e-01  grad 1.50 → 1.00 limit 1.00  "
    assert line == expected + "eta –  – tok/s  clipped 50% skipped 1  noise –\n"


def test_the_line_averages_what_is_finite_and_says_what_is_not(capsys):
    rows = [{"loss": x} for x in (math.nan, 2.0, math.inf, math.nan, 1.0)]
    screen_of(rows, log_every=1)
    lines = capsys.readouterr().out.splitlines()
    losses = [line.split("  loss ")[1].split(" val")[0] for line in lines]
    finite = ["2.000", "not finite", "not finite for 2 steps", "1.900"]
    assert losses == ["not finite", *finite]


def test_the_line_says_that_a_branch_is_open_and_leaves_probes_out(capsys):
    open_, back = {"branch/length": 3.0}, {"branch/rollbacks": 1.0}
    probe = {"loss": 9.0, "branch/probed": 1.0}
    rows = [{"loss": 1.0}, {"loss": 1.0} | open_, probe | back, {"loss": 1.0} | back]
    screen_of(rows, log_every=1)
    lines = capsys.readouterr().out.splitlines()
    assert all("loss 1.000" in line for line in lines)
    assert "branch" not in lines[0]
    assert "skipped 0  branch 3  noise" in lines[1]
    assert "skipped 0  taken back 1  noise" in lines[2]


@pytest.mark.parametrize("on_spike", ["skip", "branch"])
@full
def test_what_is_evaluated_is_what_a_branch_has_kept(on_spike, monkeypatch):
    config = train.Config(on_spike=on_spike)
    model, optimizer = training.create(config, vocabulary=256)
    trained = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    kept = jax.tree.map(lambda x: x + 1, trained)
    monkeypatch.setattr(ost, "eval_params", lambda params, state: kept)
    found = nnx.state(training.to_evaluate(config, model, optimizer), nnx.Param)
    chex.assert_trees_all_equal(found, kept if on_spike == "branch" else trained)


def test_the_line_tells_speed_and_use_and_time_left(capsys):
    speed = {"perf/tokens_per_second": 4.0, "perf/mfu": 0.123}
    screen_of([{"loss": 1.0} | speed, {"loss": 1.0}], log_every=1)
    first, second = capsys.readouterr().out.splitlines()
    assert "  eta 0:00:02  4.0 tok/s mfu 12%  clipped" in first
    assert "  eta –  – tok/s  clipped" in second


@pytest.mark.parametrize("speed", [1e-300, 1e300])
def test_any_speed_has_a_time_left(capsys, speed):
    screen_of([{"loss": 1.0, "perf/tokens_per_second": speed}, {"loss": 1.0}], 1)
    assert "eta" in capsys.readouterr().out


def test_a_narrow_terminal_shows_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen_of([{"loss": 1.0, "perf/tokens_per_second": 4.0}] * 3, log_every=1)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    lines = [line for line in shown.split("\n") if "eta" in line]
    assert lines
    assert all("eta 0:00:0" in line[:60] for line in lines)


def test_control_characters_are_never_printed(capsys):
    with closing(console.Screen(1, 1, "byte")) as screen:
        screen.say("a\x1b[2J\x07name\u202e")
        screen.sample("\x1b]0;title\x07", "tab\there \x00\x7f\x9b")
        screen.write(
            2,
            {
                "recheck/step": 1,
                "recheck/loss": 9.0,
                "recheck/verdict": 1.0,
                "recheck/origin": "\x1b[31mfile",
            },
        )
    printed = capsys.readouterr().out
    assert "name" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


def test_a_run_that_goes_on_shows_its_last_evaluation(capsys):
    screen_of([{"loss": 1.0}], 1, {"step": 0, "eval/bits": 3.21})
    assert " val 3.210 " in capsys.readouterr().out


def test_bits_are_per_byte_where_bytes_are_known(capsys):
    row = {"eval/loss": 2.0, "eval/bits": 2.885}
    screen_of([row | {"eval/bits_per_byte": 0.9}, row], log_every=1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step   1  held-out loss 2.000 = 0.900 bits/byte  after 8.0 bytes"
    assert second == "step   2  held-out loss 2.000 = 2.885 bits/byte  after 16 bytes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data nowhere.txt", "error: --data: no such file or folder: nowhere.txt"),
        ("--data tiny.txt", "error: --data: tiny.txt is too small"),
        ("--data odd.bin", "error: --data: odd.bin has 5 bytes"),
        ("--data empty", "error: --data: no UTF-8 text in empty"),
        ("--resume must", "error: --resume: no checkpoint in runs/gpt; check --out"),
        ("--inject nan@0", "error: --inject: nan@0 is not a fault; write KIND@BATCH"),
        ("--gradient-penalty -1", "error: --gradient-penalty: -1.0 is out of range"),
        ("--keep-checkpoints 0", "error: --keep-checkpoints: 0 is too small; give"),
        ("--tokenizer x.json", "error: --tokenizer: "),
        ("--batch-size 12", "error: --batch-size: 12 cannot be split into 8 parts"),
        ("--steps 0", "error: --steps: 0 is too small"),
        ("--weight-decay -1", "error: --weight-decay: -1.0 is out of range; give"),
        ("--clip-when-noisy -1", "error: --clip-when-noisy: -1.0 is out of range; g"),
        ("--clip-when-noisy inf", "error: --clip-when-noisy: inf is out of range; g"),
        ("--steps 5 --warmup-steps 5", "error: --warmup-steps: 5 leaves no step"),
        ("--data text.txt --out tiny.txt", "error: --out: cannot write to tiny.txt"),
        ("--learning-rate inf", "error: --learning-rate: inf is out of range; give"),
        ("--learning-rate 0", "error: --learning-rate: 0.0 is out of range; give a"),
        ("--learning-rate nan", "error: --learning-rate: nan is out of range; give"),
        ("--min-learning-rate -1", "error: --min-learning-rate: -1.0 is out of rang"),
        ("--min-learning-rate nan", "error: --min-learning-rate: nan is out of rang"),
        ("--seed 99999999999999999999", "error: --seed: 99999999999999999999 is too"),
        ("--seed -1", "error: --seed: -1 is out of range; give a finite number"),
        ("--data=", "error: --data: is empty; give a value, or leave --data out"),
        ("--verify-every -1", "error: --verify-every: -1 is out of range; give a"),
        ("--data latin.txt", "error: --data: latin.txt: it is not UTF-8: byte 0xe9"),
        ("--data packed.gz", "error: --data: packed.gz: it is compressed; give a"),
        ("--data text.bin", "error: --data: text.bin is text, not token ids; write"),
    ],
)
def test_bad_input_gets_one_clear_line(
    tmp_path, text, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text("too short")
    Path("odd.bin").write_bytes(b"12345")
    Path("empty").mkdir()
    Path("latin.txt").write_bytes(b"caf" + b"\xe9" + b"!" * 400)
    Path("packed.gz").write_bytes(b"\x1f\x8b\x08" + b"\0" * 400)
    Path("text.bin").write_bytes(b"plain text " * 100)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("qk_norm", [False, True])
def test_with_normalised_queries_their_size_does_not_matter(qk_norm):
    size = model.Size(1, 16, 2, 8, 16, 0.0, qk_norm)
    gpt = model.GPT(size, 16, jnp.float32, nnx.Rngs(0))
    gpt.final_norm.scale[...] += 1
    tokens = jnp.arange(8)[None]
    before = gpt(tokens)
    kernel = gpt.blocks[0].query_key_value.kernel
    of_queries = jnp.arange(48) // 8 % 3 == 0
    kernel[...] = jnp.where(of_queries, 1e3 * kernel[...], kernel[...])
    moved = float(jnp.abs(gpt(tokens) - before).max())
    assert moved < 1e-3 if qk_norm else moved > 1e-2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_bound_on_the_logits_is_recorded_where_there_is_one(qk_norm):
    tx = training.make_optimizer(train.Config(qk_norm=qk_norm))
    size = model.Size(1, 16, 4, 8, 16, 0.0, qk_norm)
    gpt = nnx.eval_shape(lambda: model.GPT(size, 16, jnp.float32, nnx.Rngs(0)))
    params = nnx.state(gpt, nnx.Param)
    found = jax.eval_shape(lambda p: ost.metrics(tx.init(p), params=p), params)
    heads = {f"attention/logit_bound/blocks/0/{i}" for i in range(4)}
    assert (heads <= found.keys()) is not qk_norm


@pytest.mark.parametrize("size", ["tiny", "small"])
@full
def test_the_first_loss_is_that_of_no_opinion(size):
    shape = model.SIZES[size]
    gpt = model.GPT(shape, shape.vocabulary, jnp.float32, nnx.Rngs(0))
    windows = jax.random.randint(jax.random.key(0), (2, 33), 0, shape.vocabulary)
    loss = float(model.next_token_loss(gpt, windows))
    assert loss == pytest.approx(math.log(shape.vocabulary), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 0.84), ("small", 10.8), ("gpt2", 124.4)]
)
@quick_only("tiny-0.84", "small-10.8")
def test_the_sizes_are_what_the_help_says(size, millions):
    shape = model.SIZES[size]
    gpt = nnx.eval_shape(
        lambda: model.GPT(shape, shape.vocabulary, jnp.float32, nnx.Rngs(0))
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(gpt, nnx.Param)))
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def train_scaled(scale):
    """Six steps of a small GPT on ``scale``·loss, clipped, with ε = 0."""
    shape = model.Size(2, 32, 2, 16, 64, 1e-2)
    windows = jax.random.randint(jax.random.key(1), (6, 4, 17), 0, 64)
    tx = optax.chain(ost.clip_by_zscore(0.5, warmup=2), ost.safe_adamw(1e-2, b2=0.95))
    gpt = model.GPT(shape, 64, jnp.float32, nnx.Rngs(0))
    optimizer = nnx.Optimizer(gpt, tx, wrt=nnx.Param)

    @nnx.jit
    def step(gpt, optimizer, batch, scale):
        grads = nnx.grad(lambda gpt: scale * model.next_token_loss(gpt, batch))(gpt)
        optimizer.update(gpt, grads)

    for batch in windows:
        step(gpt, optimizer, batch, scale)
    assert float(ost.metrics(optimizer)["clip/fraction"]) > 0
    return nnx.to_pure_dict(nnx.state(gpt))


@full
def test_loss_scale_changes_no_bit_of_a_run():
    expected = train_scaled(1.0)
    for exponent in (-60, 60):
        chex.assert_trees_all_equal(train_scaled(2.0**exponent), expected)


@pytest.mark.usefixtures("small")
@full
def test_microbatches_do_not_change_the_course_of_training(tmp_path, text, capsys):
    settings = QUICK | {"batch_size": 32, "steps": 8, "eval_every": 8, "log_every": 8}
    curves = []
    for parts, lines in ((1, ("noise –", "unknown")), (4, ("noise 0.", "= 0."))):
        folder = tmp_path / str(parts)
        config = train.Config(data=text, out=folder, microbatches=parts, **settings)
        train.train(config)
        rows, _ = read_log(folder)
        curves.append([row["loss"] for row in rows])
        # One microbatch says nothing of the noise, and everything goes on.
        assert (rows[-1]["noise_scale/b_simple"] == 0) == (parts == 1)
        printed = capsys.readouterr().out
        assert all(line in printed for line in lines)
    np.testing.assert_allclose(*curves, rtol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.1


def test_microbatches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match="--microbatches: 3 does not divide"):
        check(train.Config(batch_size=8, microbatches=3))


@pytest.mark.usefixtures("small")
@full
def test_parameters_that_are_not_finite_are_never_the_best(tmp_path, text):
    config = train.Config(data=text, out=tmp_path, **QUICK)
    corpus = data.load(text, model.SIZES["tiny"].context)
    create = functools.partial(training.create, config, 256)
    run = train.Run(config, corpus, create, (), say=print)
    assert math.isfinite(run.evaluate()["eval/loss"])
    drawn = Drawn(step=1, batch=1, position=0, again=False)
    run.advance(drawn)
    windows = run.examine(drawn)
    assert len(windows) == 8
    assert {each.origin.rsplit(" ", 1)[0] for each in windows} == {f"{text}, byte"}
    # The row of a byte that the text does not have.
    gpt, optimizer = run.model(), run.optimizer()
    table = gpt.tokens.embedding
    table[...] = table[...].at[0].set(jnp.nan)
    run.state = run.state._replace(arrays=nnx.state((gpt, optimizer)))
    assert math.isnan(run.evaluate()["eval/loss"])
