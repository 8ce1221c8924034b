"""The command: what it prints, what it writes, and its exit codes."""

import json
import subprocess
import sys
import time

import log_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import quick_only

import optax_stability as ost
from optax_stability._diagnosis._finding import KINDS
from optax_stability._doctor import _chart, _comparison, _csv, _scores
from optax_stability._doctor._columns import log_of
from optax_stability._doctor._command import as_json, main
from optax_stability._doctor._examination import examine
from optax_stability._doctor._log import UnreadableError
from optax_stability._doctor._terminal import Style, show
from optax_stability._doctor._trainers import spelled

VALUES = ["nan", "inf", "-inf", "0", "-1", "1e-320", "1e308", "1e400", "2.3", "x", ""]
COLUMNS = ["step", "loss", "grad_norm", "lr", "eval_loss", "skip/skipped", "clip/norm"]


def rows(loss, norm=None):
    norm = np.full(len(loss), 0.5) if norm is None else norm
    lines = ["step,loss,grad_norm"]
    lines += [
        f"{i + 1},{x:.5f},{n:.5f}"
        for i, (x, n) in enumerate(zip(loss, norm, strict=True))
    ]
    return "\n".join(lines) + "\n"


def falling(seed=0, count=200):
    rng = np.random.default_rng(seed)
    return 2 + 3 * np.exp(-np.arange(count) / 40) + 0.03 * rng.standard_normal(count)


def diverging(count=200):
    return falling(count=count) + 4 * (np.arange(count) > 120)


@pytest.fixture
def healthy(tmp_path):
    path = tmp_path / "healthy.csv"
    path.write_text(rows(falling()))
    return path


@pytest.fixture
def diverged(tmp_path):
    path = tmp_path / "diverged.csv"
    path.write_text(rows(diverging()))
    return path


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_healthy_log_is_code_0_and_says_what_was_looked_at(healthy, capsys):
    code, out, err = run(capsys, "diagnose", healthy)
    assert code == 0
    assert not err
    out = " ".join(out.split())  # Lines are as wide as the terminal.
    assert "Nothing found." in out
    assert "checks ran" in out
    assert "could not run, for lack of" in out
    assert "held-out loss: overfitting" in out
    assert "cannot be told, for lack of a held-out loss" in out
    assert "loss = loss" in out
    assert "spike score 0.00%" in out
    assert "\x1b" not in out


def test_a_finding_is_code_1_and_says_what_to_do(diverged, capsys):
    code, out, _ = run(capsys, "diagnose", diverged)
    assert code == 1
    for part in (
        "1. The loss diverged  divergence",
        "since      step 122",
        "evidence   lowest loss",
        "likely     · ",
        "do         · go back to a checkpoint",
        "with optax · ",
        "docs/findings/divergence.md",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


def test_what_cannot_be_read_is_code_2_in_one_line(healthy, tmp_path, capsys):
    code, out, err = run(capsys, "diagnose", tmp_path / "none.csv", healthy)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "none.csv: there is no such file" in err
    assert "Nothing found." in out  # The other one is examined all the same.


def test_json_has_everything(diverged, healthy, capsys):
    code, out, _ = run(capsys, "diagnose", diverged, "--json", "--against", healthy)
    (log,) = json.loads(out)["logs"]
    assert code == 1
    assert [each["kind"] for each in log["findings"]] == ["divergence"]
    assert set(log["findings"][0]) == set(ost.Finding._fields)
    assert [each["kind"] for each in log["checks"]] == list(KINDS)
    assert log["columns"]["grad/norm"] == "grad_norm"
    assert (log["rows"], log["steps"]) == (200, [1.0, 200.0])
    assert log["against"][0]["step"] == 122


def test_a_report_and_a_picture_are_written(diverged, healthy, tmp_path, capsys):
    report, plot = tmp_path / "r.html", tmp_path / "p.png"
    code, _, err = run(
        capsys, "diagnose", diverged, healthy, "--report", report, "--plot", plot
    )
    assert code == 1
    page = report.read_text()
    assert "The loss diverged" in page
    assert "go back to a checkpoint" in page  # In words, for any trainer.
    assert "held-out loss: <code>overfitting</code>" in page
    assert "No finding" in (tmp_path / "r_2.html").read_text()
    assert plot.read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "p_2.png").exists()
    assert "r_2.html" in err


def test_curves_are_drawn_in_the_terminal(diverged, capsys):
    for arguments in (
        ("diagnose", diverged, "--plot"),
        ("diagnose", "--plot", diverged),
    ):
        _, out, _ = run(capsys, *arguments)
        assert "█" in out
        assert "gradient norm (logarithmic)" in out


def test_columns_that_are_not_recognised_can_be_named(tmp_path, capsys):
    path = tmp_path / "odd.csv"
    path.write_text(rows(diverging()).replace("loss", "objective"))
    code, out, _ = run(capsys, "diagnose", path)
    assert "divergence" not in out.partition("checks ran")[0]
    code, out, _ = run(capsys, "diagnose", path, "--loss", "objective")
    assert code == 1
    code, _, err = run(capsys, "diagnose", path, "--loss", "no")
    assert code == 2
    assert "there is no column 'no'" in err


def test_advice_is_spelled_for_the_trainer(tmp_path, capsys):
    history = [{"step": i + 1, "loss": float(x)} for i, x in enumerate(diverging())]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}))
    _, out, _ = run(capsys, "diagnose", path)
    assert "learning_rate=" in out
    assert spelled("lengthen the warm-up", "nanoGPT").endswith("(warmup_iters)")
    assert spelled("lengthen the warm-up", "") == "lengthen the warm-up"


def test_a_run_of_this_library_gets_its_functions_alone(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    row = {"skip/skipped": 0.0, "clip/limit": 1.0}
    path.write_text(
        "\n".join(
            json.dumps({"step": i, "loss": float(x)} | row)
            for i, x in enumerate(diverging())
        )
    )
    _, out, _ = run(capsys, "diagnose", path)
    assert "with optax" in out
    assert "   do  " not in out
    assert "clip_by_zscore()" not in out  # It is there.


@pytest.mark.parametrize("module", [True, False])
def test_it_is_a_module_and_a_script(module, healthy):
    script = [sys.executable, "-m", "optax_stability"]
    if not module:
        script = [f"{sys.prefix}/bin/optax-stability"]
    done = subprocess.run(
        [*script, "diagnose", str(healthy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing found." in done.stdout


def in_the_form_of(form, count, monkeypatch):
    """A long log in one of the forms of ``log_samples``."""
    loss = falling(count=count).round(4).tolist()
    steps = range(1, count + 1)
    monkeypatch.setattr(
        samples, "ROWS", [(i, x, 0.5, 1e-3) for i, x in zip(steps, loss, strict=True)]
    )
    name, text, *_ = samples.ALL[form]
    return name, text()


@quick_only("CSV")
@pytest.mark.parametrize("form", ["CSV", "Megatron-LM", "torchtitan", "OLMo"])
def test_a_hundred_thousand_rows_take_less_than_three_seconds(
    form, tmp_path, monkeypatch
):
    """Of this process: its import was measured elsewhere."""
    name, text = in_the_form_of(form, 100_000, monkeypatch)
    (tmp_path / name).write_text(text)
    start = time.process_time()
    assert main(["diagnose", str(tmp_path / name)]) == 0
    assert time.process_time() - start < 3


# --- Against another run. -------------------------------------------------------------


def history(loss, every=1):
    return {"step": every * np.arange(1, len(loss) + 1), "loss": loss}


def test_equal_runs_do_not_part():
    (same,) = _comparison.compare(history(falling()), history(falling()))
    assert same.step is None


def test_runs_of_other_seeds_do_not_part():
    parted = [
        _comparison.compare(history(falling(i)), history(falling(i + 500)))[0].step
        for i in range(100)
    ]
    assert sum(each is not None for each in parted) <= 2


@pytest.mark.parametrize("every", [1, 7])
def test_runs_part_where_one_leaves(every):
    """The baseline may have been logged at other steps."""
    leaving = falling() + 0.01 * np.maximum(0, np.arange(200) - 100)
    (parted,) = _comparison.compare(
        history(leaving), history(falling(1)[every - 1 :: every], every)
    )
    assert parted.step is not None
    assert 100 < parted.step < 125
    assert parted.run > parted.other
    assert "apart from step" in str(parted)


def test_runs_without_a_common_step_say_so():
    other = history(falling()) | {"step": np.arange(1000, 1200)}
    (found,) = _comparison.compare(history(falling()), other)
    assert "no step in common" in str(found)


def test_the_spike_score_counts_what_is_above_six_sigma():
    values = np.random.default_rng(0).standard_normal(1000)
    assert _scores.spike_score(values) == 0
    values[[300, 600, 900]] = 20
    assert _scores.spike_score(values) == 3 / 1000
    values[500] = np.nan
    assert _scores.spike_score(values) == 3 / 999
    assert _scores.spike_score(values[:100]) == 0


def test_all_samples_of_logs_can_be_examined(tmp_path, capsys):
    for name, text, _, _ in samples.ALL.values():
        (tmp_path / name).write_text(text())
        code, out, err = run(capsys, "diagnose", tmp_path / name)
        assert code == 0, (name, out, err)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 30, 130]))
def test_no_log_raises_anything_but_that_it_cannot_be_read(data, count):
    """Whatever numbers it holds; and every warning would be an error here."""
    pool = st.lists(st.sampled_from(VALUES), min_size=1, max_size=4)
    cells = {name: np.resize(data.draw(pool, label=name), count) for name in COLUMNS}
    lines = [",".join(COLUMNS), *map(",".join, zip(*cells.values(), strict=True))]
    rows = _csv.tables("\n".join(lines))[""]
    try:
        log = log_of("a log", rows, {})
        examined = examine(log, log)
    except UnreadableError:
        return
    assert show(examined, Style(colour=False, width=80))
    json.dumps(as_json(examined))
    for key in ("loss", "grad/norm"):
        _chart.chart(key, log.history, key, 80)
