"""The docs show what the last full runs have measured, and say where it is from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reporting
import run
import tables
import trainer_step
from tiers import full

BENCHMARKS = Path(tables.__file__).parent
PAGES = {path: path.read_text() for path in tables.PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_the_last_full_runs(path):
    stale = "run: python benchmarks/tables.py"
    assert tables.render(PAGES[path]) == PAGES[path], stale


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_one_place_in_the_docs(name):
    assert "".join(PAGES.values()).count(f"<!-- table {name} -->") == 1


def test_a_number_that_changes_is_written_into_its_table(monkeypatch):
    report = reporting.read("low_precision")
    (row, *_) = report["runs"].values()
    row["mean"] = 9.123
    monkeypatch.setattr(tables, "read", lambda suite: report)
    text = "before\n<!-- table low_precision -->\nold\n<!-- end -->\nafter\n"
    rendered = tables.render(text)
    assert "9.123" in rendered
    assert "old" not in rendered
    assert rendered.startswith("before\n<!-- table low_precision -->\n")
    assert rendered.endswith("<!-- end -->\nafter\n")
    assert tables.render(rendered) == rendered


def stored():
    return sorted(reporting.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", stored(), ids=lambda path: path.stem)
def test_every_report_says_where_it_is_from(path):
    for suite, report in reporting.read_all(path).items():
        assert reporting.path_of(report["device"]) == path
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"])
        assert report["cores"] > 0
        script = report["command"].split()[1]
        assert (BENCHMARKS.parent / script).exists(), suite
        assert {"python", "jax", "optax", "version", "platform"} <= report.keys()
        assert reporting.hardware(report) in reporting.caption(report)
        assert report["command"] in reporting.caption(report)


@pytest.mark.parametrize("path", stored(), ids=lambda path: path.stem)
def test_the_page_of_a_device_shows_all_its_reports(path):
    assert path.with_suffix(".md").read_text() == tables.page(path)


def test_every_suite_is_a_script_whose_help_says_what_it_does():
    for suite in (*run.ON_EVERY_DEVICE, *run.ANYWHERE):
        script = run.script_of(suite)
        source = script / "__init__.py" if script.is_dir() else script
        assert f"python benchmarks/{script.name} --quick" in source.read_text()
    modules = {path.stem for path in BENCHMARKS.glob("*.py")}
    modules |= {path.parent.name for path in BENCHMARKS.glob("*/__main__.py")}
    helpers = {"run", "tables", "reporting", "corpus", "peers", "norm_taps"}
    helpers |= {"faulty_streams", "contenders", "grids", "plain_step"}
    helpers |= {"noise_recording", "noise_norms_recording"}
    # It needs compilers for accelerators, which are an extra.
    helpers |= {"accelerator_programs", "hlo_counts", "notebook_steps", "targets"}
    helpers |= {"real_logs"}  # It needs logs that are not in the repository.
    assert modules - helpers == {*run.ON_EVERY_DEVICE, *run.ANYWHERE}


@full
def test_a_folder_of_studies_is_called_like_a_file():
    command = [sys.executable, str(run.script_of("early_warning")), "--help"]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "python benchmarks/early_warning --quick" in ended.stdout


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("growth.py", "growth.py"),
        ("benchmarks/early_warning/", "early_warning"),
        ("benchmarks/early_warning/__main__.py", "early_warning"),
    ],
)
def test_a_report_says_how_to_make_it_again(called, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called, "--only", "x"])
    assert reporting.command() == f"python benchmarks/{shown} --only x"


def test_a_report_goes_into_the_file_of_its_device(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "RESULTS", tmp_path)
    reporting.save("a", {"device": "Some GPU, 80GB", "numbers": [1, 2]})
    reporting.save("b", {"device": "Some GPU, 80GB"})
    reporting.save("b", {"device": "cpu", "x": "σ"})
    reporting.save("a", {"device": "Some GPU, 80GB", "numbers": [3, 4]})
    gpu = json.loads((tmp_path / "some_gpu_80gb.json").read_text())
    assert gpu["a"]["numbers"] == [3, 4]
    assert list(gpu) == ["a", "b"]
    assert reporting.devices_with("b") == {
        "cpu": {"device": "cpu", "x": "σ"},
        "some_gpu_80gb": {"device": "Some GPU, 80GB"},
    }
    assert "[3, 4]" not in (tmp_path / "cpu.json").read_text()


@full
def test_an_unknown_suite_is_an_error_that_names_the_others():
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--only", "stabilty"]
    ended = subprocess.run(command, capture_output=True, check=False, text=True)
    assert ended.returncode == 2
    assert "stability" in ended.stderr


def test_the_chain_costs_little_of_a_step_on_cpu():
    (rows,) = reporting.read("trainer_step")["cases"].values()
    assert rows[trainer_step.OURS]["time_ratio"]["median"] <= 1.03


@full
def test_a_suite_that_fails_is_named(capfd):
    assert run.run("nothing", []) == "nothing ended with 2"
    assert "can't open file" in capfd.readouterr().err
    assert not run.run("reporting", [])  # A script that does nothing ends well.
