"""What every command of the examples does with errors, flags and output."""

import io
import logging
import subprocess
import sys

import pytest
from command import run_command
from inputs import InputError

from optax_stability.loop import FailedError


@pytest.fixture(autouse=True)
def settings_are_put_back(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


def run(monkeypatch, work, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command(work)
    return stopped.value.code


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("--data: no"), 2, "error: --data: no\n"),
        (FailedError("diverged"), 1, "error: diverged\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_the_user_is_one_line(monkeypatch, capsys, error, code, says):
    assert run(monkeypatch, failing(error)) == code
    assert capsys.readouterr().err == says


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(
    "arguments", [["--data", ""], ["--data", "  "], ["--data="], ["-x", "--data="]]
)
def test_an_empty_argument_is_refused(monkeypatch, capsys, arguments):
    assert run(monkeypatch, failing(AssertionError), *arguments) == 2
    says = "error: --data: is empty; give a value, or leave --data out\n"
    assert capsys.readouterr().err == says


def test_what_the_output_cannot_show_is_a_question_mark(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    run_command(lambda: output.write("1.77 → 1.77"))
    output.flush()
    assert output.buffer.getvalue() == b"1.77 ? 1.77"


def test_a_second_ctrl_c_ends_the_process_at_once():
    code = "import command; command.end_at_once()"
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=path, check=False)
    assert done.returncode == 130
