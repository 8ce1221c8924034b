"""The log of a run: killed, resumed, rewound, damaged, on a full disk."""

import contextlib
import json
import math
import resource
import shutil

import numpy as np
import pytest

import optax_stability as ost
from optax_stability._core import _atomic_file

ROWS = {1: {"loss": 3.5, "noise/low": math.nan}, 2: {"loss": math.inf, "noise/low": 7}}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_lines_is_whole_after_every_row(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    lines = ost.RunLog(path)
    assert read_lines(path) == []
    for step, row in ROWS.items():
        lines.write(step, row)
        assert read_lines(path)[-1]["step"] == step  # Not closed.
    assert read_lines(path) == [
        {"step": 1, "loss": 3.5, "noise/low": None},
        {"step": 2, "loss": None, "noise/low": 7},
    ]
    ost.RunLog(path)
    assert read_lines(path) == []


def test_lines_are_read_back_as_a_history(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = ost.RunLog(path)
    for step, row in ROWS.items():
        lines.write(step, row)
    lines.write(2, {"eval/loss": 2.5})
    columns = ost.read_log(path)
    assert columns.pop("step").tolist() == [1, 2]
    expected = {
        "loss": [3.5, math.nan],
        "noise/low": [math.nan, 7],
        "eval/loss": [math.nan, 2.5],
    }
    assert columns.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(columns[key], values)


def row_of(step, batch, **numbers):
    return {"step": step, "batch": batch, **numbers}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_columns(path):
    return {key: x.tolist() for key, x in ost.read_log(path).items()}


def test_a_run_that_goes_on_keeps_the_rows_it_will_not_write_again(tmp_path):
    path = tmp_path / "log.jsonl"
    # After step 3 it went back to step 1, over batches 4 to 8.
    rows = [row_of(step, step, loss=1.0 / step) for step in (1, 2, 3)]
    rows += [row_of(3, 8, **{"rewind/to": 1}), row_of(2, 9, loss=None)]
    rows += [row_of(2, 9, **{"eval/loss": 0.25}), row_of(3, 10, loss=0.75)]
    for resume_after in range(12):
        write_rows(path, rows)
        ost.RunLog(path, resume_after=resume_after)
        kept = [row for row in rows if row["batch"] <= resume_after]
        assert read_lines(path) == kept
        content = path.read_bytes()
        lines = ost.RunLog(path, resume_after=resume_after)  # Killed at once.
        assert path.read_bytes() == content
        lines.write(4, {"batch": 11, "loss": 0.5})
        assert read_lines(path) == [*kept, row_of(4, 11, loss=0.5)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_goes_on_without_its_file_gets_a_new_one(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    ost.RunLog(path, resume_after=7).write(8, {"batch": 8})
    assert read_lines(path) == [row_of(8, 8)]


def test_a_row_that_was_torn_is_lost_and_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = [row_of(1, 1, loss=3.5), row_of(2, 2, loss=2.5)]
    write_rows(path, [*whole, row_of(3, 3, loss=1.5)])
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content)):
        path.write_bytes(content[:end])
        assert read_columns(path)["loss"] == [3.5, 2.5]
        lines = ost.RunLog(path, resume_after=3)
        assert read_lines(path) == whole
        lines.write(3, {"batch": 3, "loss": 1.5})
        assert path.read_bytes() == content


def test_a_kill_while_the_file_is_shortened_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write_rows(path, [row_of(1, 1), row_of(2, 2)])
    content = path.read_bytes()

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_atomic_file.os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            ost.RunLog(path, resume_after=1)
    assert path.read_bytes() == content
    ost.RunLog(path, resume_after=1)
    assert list(tmp_path.iterdir()) == [path]
    assert read_lines(path) == [row_of(1, 1)]


def test_steps_that_a_rewind_has_undone_are_no_history(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [row_of(step, step, loss=9.0) for step in (0, 10, 20, 30)]
    rows[2]["eval/loss"] = 8.0
    # Back to step 15: the next row is of a step that was not logged before.
    rows += [row_of(30, 50, **{"rewind/to": 15})]
    write_rows(path, rows)
    np.testing.assert_array_equal(read_columns(path)["loss"], [9, 9, 9, math.nan])
    rows += [row_of(15, 50, **{"eval/loss": 7.0})]
    write_rows(path, rows)
    assert read_columns(path)["step"] == [0, 10, 15]
    rows += [row_of(18, 53, loss=5.0)]
    rows += [row_of(20, 55, loss=4.0), row_of(20, 55, **{"eval/loss": 3.0})]
    write_rows(path, rows)
    columns = read_columns(path)
    assert columns["step"] == [0, 10, 15, 18, 20]
    assert columns["batch"] == [0, 10, 50, 53, 55]
    np.testing.assert_array_equal(columns["loss"], [9, 9, math.nan, 5, 4])
    np.testing.assert_array_equal(
        columns["eval/loss"], [math.nan] * 2 + [7, math.nan, 3]
    )
    assert "rewind/to" not in columns
    # Back again, behind where it had gone back to.
    write_rows(path, [*rows, row_of(20, 80, **{"rewind/to": 5}), row_of(6, 81)])
    assert read_columns(path)["step"] == [0, 6]


def test_a_run_that_is_killed_after_a_rewind_has_the_same_history(tmp_path):
    rows = [row_of(step, step, loss=float(step)) for step in range(6)]
    rows += [row_of(5, 8, **{"rewind/to": 2})]
    rows += [row_of(step, step + 6, loss=-float(step)) for step in range(3, 7)]
    path = tmp_path / "log.jsonl"
    write_rows(path, rows)
    expected = read_columns(path)
    assert expected["loss"] == [0, 1, 2, -3, -4, -5, -6]
    for killed_at in range(len(rows) + 1):
        for resume_after in range(13):
            write_rows(path, rows[:killed_at])
            lines = ost.RunLog(path, resume_after=resume_after)
            written = read_lines(path)
            for row in rows[len(written) : killed_at]:
                assert row["batch"] > resume_after
            for row in rows[len(written) :]:
                lines.write(row["step"], row)
            assert read_columns(path) == expected


def test_rows_that_count_no_batches_are_joined_by_step(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 2, "b": 3.0}]
    write_rows(path, rows)
    columns = read_columns(path)
    assert (columns["step"], columns["a"]) == ([2, 1], [1, 2])
    np.testing.assert_array_equal(columns["b"], [3, math.nan])
    # Notes beside the rows of a run do not hide that it went back, nor do late rows.
    noted = [row_of(1, 1, loss=1.0), {"step": 1, "note": 7.0}, row_of(2, 2, loss=2.0)]
    noted += [row_of(1, 1, late=4.0), row_of(2, 2, old=5.0), {"step": 1, "note": 8.0}]
    write_rows(path, [*noted, row_of(2, 5, loss=3.0)])
    assert read_columns(path) == {
        "step": [1, 2],
        "batch": [1, 5],
        "loss": [1, 3],
        "note": pytest.approx([8, math.nan], nan_ok=True),
        "late": pytest.approx([4, math.nan], nan_ok=True),
    }


@pytest.mark.parametrize("content", ["", '{"step": 1, "lo'])
def test_a_file_without_a_whole_row_is_an_empty_history(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    assert read_columns(tmp_path / "log.jsonl") == {"step": []}


# --- damage ------------------------------------------------------------------------

DAMAGES = {
    "half": lambda line: line[: len(line) // 2],
    "blank": lambda line: b"",
    "spaces": lambda line: b"   ",
    "NULs": lambda line: b"\0" * 60,
    "no UTF-8": lambda line: b"\xff\xfe" + line,
    "a number": lambda line: b"3",
    "a list": lambda line: b"[1, 2]",
    "no step": lambda line: b'{"batch": 2, "loss": 1.0}',
    "a text for a step": lambda line: b'{"step": "2"}',
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_line_is_left_out_and_counted(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    rows = [row_of(step, step, loss=1.0 / step) for step in range(1, 7)]
    write_rows(path, rows)
    lines = path.read_bytes().splitlines()
    for at in ([1], [0, 3], [4, 5]):
        bad = [damage(x) if i in at else x for i, x in enumerate(lines)]
        content = b"".join(line + b"\n" for line in bad)
        path.write_bytes(content)
        good, told = [x for i, x in enumerate(rows) if i not in at], []
        columns = ost.read_log(path, report=told.append)
        assert columns["step"].tolist() == [row["step"] for row in good]
        count = "1 line that is" if len(at) == 1 else f"{len(at)} lines that are"
        assert told.pop() == f"{path}: left out {count} no row in JSON"
        log = ost.RunLog(path, resume_after=5, report=told.append)
        kept = [row for row in good if row["batch"] <= 5]
        assert read_lines(path) == kept
        aside = tmp_path / "log.jsonl.damaged"
        assert told.pop().endswith(f"no row in JSON; {aside} has them")
        assert aside.read_bytes() == content
        log.write(9, {"batch": 9})
        assert read_lines(path) == [*kept, row_of(9, 9)]


def test_a_tail_of_nothing_is_no_row(tmp_path):
    """As a file system leaves it that lost power."""
    path = tmp_path / "log.jsonl"
    write_rows(path, [row_of(1, 1, loss=2.0)])
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert read_columns(path)["loss"] == [2.0]
    ost.RunLog(path, resume_after=1).write(2, {"batch": 2})
    assert read_lines(path) == [row_of(1, 1, loss=2.0), row_of(2, 2)]


def test_damage_is_a_warning_by_default(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("no JSON\n")
    with pytest.warns(UserWarning, match="left out 1 line that is no row in JSON"):
        assert ost.read_log(path)["step"].tolist() == []
    with pytest.warns(UserWarning, match=r"log\.jsonl\.damaged has them"):
        ost.RunLog(path, resume_after=3)


def test_columns_that_hold_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    log = ost.RunLog(path)
    log.write(1, {"loss": 1.0, "origin": "a.txt, byte 7", "list": [1]})
    log.write(2, {"loss": 2.0})
    assert read_columns(path) == {"step": [1, 2], "loss": [1.0, 2.0]}


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond this size: as a full disk, for this process alone."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("spare", range(0, 60, 7))
def test_rows_wait_until_the_disk_has_room(tmp_path, spare):
    path, told = tmp_path / "log.jsonl", []
    log = ost.RunLog(path, report=told.append)
    rows = [row_of(step, step, loss=float(step)) for step in range(1, 9)]
    for row in rows[:3]:
        log.write(row["step"], row)
    whole = path.read_bytes()
    with full_disk(len(whole) + spare):  # A part of a row may fit.
        for row in rows[3:6]:
            log.write(row["step"], row)
        assert read_columns(path)["step"][:3] == [1, 2, 3]
    (says,) = told
    assert says.startswith(f"{path}: cannot be written (File too large);")
    for row in rows[6:]:
        log.write(row["step"], row)
    log.close()
    assert read_lines(path) == rows
    assert len(told) == 1


def test_rows_that_could_never_be_written_are_counted_in_the_end(tmp_path):
    path, told = tmp_path / "log.jsonl", []
    log = ost.RunLog(path, report=told.append)
    log.write(1, {"batch": 1})
    with full_disk(path.stat().st_size):
        log.write(2, {"batch": 2})
        log.write(3, {"batch": 3})
        log.close()
    assert told[1] == f"{path}: 2 rows are lost (File too large)"
    assert read_columns(path)["step"] == [1]


def test_a_log_that_is_removed_under_the_run_begins_again(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = ost.RunLog(path)
    log.write(1, {"batch": 1})
    shutil.rmtree(path.parent)
    log.write(2, {"batch": 2})
    assert read_lines(path) == [row_of(2, 2)]
