"""A log that grows: what is new is said once, and a command is told."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from test_doctor_command import diverging, falling, rows

from optax_stability._diagnosis import _telling
from optax_stability._doctor import _serving, _watching
from optax_stability._doctor._command import main
from optax_stability._doctor._log import UnreadableError


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A log that gets more of its rows at each look."""
    path, text = tmp_path / "run.csv", rows(diverging())
    lines = text.splitlines(keepends=True)
    lengths = iter([60, 110, 150, 201, 201])

    def grow(_seconds=0):
        path.write_text("".join(lines[: next(lengths, 201)]))

    monkeypatch.setattr(_watching.time, "sleep", grow)
    return path


def watch(path, looks=5, **options):
    """(findings that were shown, number of rows when they were)."""
    shown = []
    _watching.watch(
        str(path),
        {},
        every=1.0,
        seconds=looks + 0.5,
        show=lambda examined, new: shown.extend(
            (each.kind, len(examined.log.history["step"])) for each in new
        ),
        **options,
    )
    return shown


@pytest.fixture
def clock(monkeypatch):
    """Time goes on by one second with each look at it."""
    seconds = iter(np.arange(0, 1e4, 1.0))
    monkeypatch.setattr(_watching.time, "monotonic", lambda: next(seconds))


@pytest.mark.usefixtures("clock")
def test_a_finding_is_said_once_as_soon_as_it_is_there(growing, capsys):
    assert watch(growing) == [("divergence", 149)]
    assert "waiting" in capsys.readouterr().err  # There was no file at first.


@pytest.mark.usefixtures("clock")
def test_a_command_gets_the_finding_as_json(growing, tmp_path):
    told = tmp_path / "told.json"
    watch(growing, command=f'cat > "{told}"; echo "$FINDING_KIND" >> "{told}.kind"')
    message = json.loads(told.read_text())
    assert message["kind"] == "divergence"
    assert message["log"] == str(growing)
    assert message["last_step"] == 149
    assert {"step", "evidence", "causes", "remedies", "elsewhere"} <= set(message)
    assert (tmp_path / "told.json.kind").read_text() == "divergence\n"


def test_a_command_that_fails_does_not_end_the_watch(capsys):
    _watching.tell("exit 7", {"kind": "divergence", "step": 3})
    assert "failed with exit code 7; the watch goes on" in capsys.readouterr().err


def test_a_command_that_hangs_is_ended(monkeypatch, capsys):
    monkeypatch.setattr(_telling, "_COMMAND_SECONDS", 0.1)
    _watching.tell("sleep 5", {"kind": "divergence", "step": 3})
    assert "was ended after 0.1 seconds" in capsys.readouterr().err


def test_the_exit_code_says_whether_anything_was_found(tmp_path, capsys):
    path = tmp_path / "run.csv"
    path.write_text(rows(falling()))
    assert main(["watch", str(path), "--for", "0.1"]) == 0
    path.write_text(rows(diverging()))
    assert main(["watch", str(path), "--for", "0.1"]) == 1
    assert "The loss diverged" in capsys.readouterr().out


def test_an_interrupt_ends_it_with_the_code(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(rows(diverging()))
    process = subprocess.Popen(
        [sys.executable, "-m", "optax_stability", "watch", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "stopped\n"


def get(server, path):
    host, port = server.server_address[:2]
    return urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10)


def test_the_report_is_served_and_renews_itself(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(rows(falling()))
    pages = _serving.Pages()
    server = _serving.serve(0, "127.0.0.1", pages, every=5)
    try:
        with get(server, "/") as answer:
            assert b"Waiting" in answer.read()
        examined = next(_watching.examinations(str(path), {}, 1.0, time.monotonic()))
        pages.renew(examined)
        with get(server, "/?again") as answer:
            assert answer.headers["Refresh"] == "5"
            assert b"No finding" in answer.read()
        path.write_text(rows(diverging()))
        pages.renew(next(_watching.examinations(str(path), {}, 1.0, time.monotonic())))
        with get(server, "/") as answer:
            assert b"The loss diverged" in answer.read()
        with get(server, "/findings.json") as answer:
            (log,) = json.load(answer)
            assert log["findings"][0]["kind"] == "divergence"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server, "/../../etc/passwd")
        with pytest.raises(UnreadableError, match="choose another port"):
            _serving.serve(server.server_address[1], "127.0.0.1", pages, every=5)
    finally:
        server.shutdown()
        server.server_close()


def test_several_logs_have_a_page_each(tmp_path):
    for name, loss in (("a", falling()), ("<b>", diverging())):
        (tmp_path / f"{name}.csv").write_text(rows(loss))
    pages = _serving.Pages()
    pages.renew(next(_watching.examinations(str(tmp_path), {}, 1.0, time.monotonic())))
    _, index = pages.get("/")
    assert b"&lt;b&gt;.csv" in index
    assert {pages.get("/1") is not None, pages.get("/2") is not None} == {True}
    assert pages.get("/3") is None
