"""The writers that the examples share."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import writers
from tensorboardX.proto.event_pb2 import Event, SessionLog

import optax_stability as ost

ROWS = {1: {"loss": 3.5, "noise/low": math.nan}, 2: {"loss": math.inf, "noise/low": 7}}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_events(folder):
    """All events in the files of a folder: length, checksum, event, checksum."""
    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def read_scalars(folder):
    return [
        (event.step, value.tag, value.simple_value)
        for event in read_events(folder)
        for value in event.summary.value
    ]


def test_a_file_of_lines_is_whole_after_every_row(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    lines = writers.JsonLines(path)
    assert read_lines(path) == []
    for step, row in ROWS.items():
        lines.write(step, row)
        assert read_lines(path)[-1]["step"] == step  # Not closed.
    assert read_lines(path) == [
        {"step": 1, "loss": 3.5, "noise/low": None},
        {"step": 2, "loss": None, "noise/low": 7},
    ]
    writers.JsonLines(path)
    assert read_lines(path) == []


def test_tensorboard_gets_scalars_and_nothing_that_is_not_finite(tmp_path):
    with writers.TensorBoard(tmp_path / "curves") as curves:
        for step, row in ROWS.items():
            curves.write(step, row)
    scalars = read_scalars(tmp_path / "curves")
    assert scalars == [(1, "loss", 3.5), (2, "noise/low", 7.0)]


def test_tensorboard_gets_histograms_over_the_exponents(tmp_path):
    x = jnp.array([0.0, 0.75, 0.75, 3.0, 2.0**-50])
    tx = ost.record("grad", histogram=True)
    counts = ost.metrics(tx.update({"w": x}, tx.init({"w": x}))[1])["grad/histogram"]
    nothing, bad = np.zeros(50), np.full(50, np.nan)
    with writers.Several(writers.TensorBoard(tmp_path / "curves")) as curves:
        for key, each in {"w": np.asarray(counts), "zero": nothing, "nan": bad}.items():
            curves.write_histograms(4, {key: each})
    (event,) = [e for e in read_events(tmp_path / "curves") if e.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag, value.histo.num) == (4, "w (log2)", 4)
    filled = {
        limit: count
        for limit, count in zip(
            value.histo.bucket_limit, value.histo.bucket, strict=True
        )
        if count
    }
    assert filled == {-40: 1, 0: 2, 2: 1}  # Below 2⁻⁴⁰, in [½, 1), in [2, 4).
    assert (value.histo.min, value.histo.max) == (-41, 2)


def test_lines_are_read_back_as_a_history(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = writers.JsonLines(path)
    for step, row in ROWS.items():
        lines.write(step, row)
    lines.write(2, {"eval/loss": 2.5})
    columns = writers.read_json_lines(path)
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
    return {key: x.tolist() for key, x in writers.read_json_lines(path).items()}


def test_a_run_that_goes_on_keeps_the_rows_it_will_not_write_again(tmp_path):
    path = tmp_path / "log.jsonl"
    # After step 3 it went back to step 1, over batches 4 to 8.
    rows = [row_of(step, step, loss=1.0 / step) for step in (1, 2, 3)]
    rows += [row_of(3, 8, **{"rewind/to": 1}), row_of(2, 9, loss=None)]
    rows += [row_of(2, 9, **{"eval/loss": 0.25}), row_of(3, 10, loss=0.75)]
    for resume_after in range(12):
        write_rows(path, rows)
        writers.JsonLines(path, resume_after=resume_after)
        kept = [row for row in rows if row["batch"] <= resume_after]
        assert read_lines(path) == kept
        content = path.read_bytes()
        lines = writers.JsonLines(path, resume_after=resume_after)  # Killed at once.
        assert path.read_bytes() == content
        lines.write(4, {"batch": 11, "loss": 0.5})
        assert read_lines(path) == [*kept, row_of(4, 11, loss=0.5)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_goes_on_without_its_file_gets_a_new_one(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    writers.JsonLines(path, resume_after=7).write(8, {"batch": 8})
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
        lines = writers.JsonLines(path, resume_after=3)
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
        patch.setattr(type(path), "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            writers.JsonLines(path, resume_after=1)
    assert path.read_bytes() == content
    writers.JsonLines(path, resume_after=1)
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
            lines = writers.JsonLines(path, resume_after=resume_after)
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


@pytest.mark.parametrize(("resume_after_step", "first"), [(None, 0), (0, 1), (7, 8)])
def test_tensorboard_hides_what_will_be_written_again(
    tmp_path, resume_after_step, first
):
    writers.TensorBoard(tmp_path, resume_after_step=resume_after_step).close()
    starts = [
        event.step
        for event in read_events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [first]


def test_after_a_rewind_a_curve_goes_back(tmp_path):
    with writers.TensorBoard(tmp_path) as curves:
        for step in (1, 2, 1):
            curves.write(step, {"loss": 1.0})
    assert [step for step, *_ in read_scalars(tmp_path)] == [1, 2, 1]


def test_an_error_loses_nothing_that_was_written(tmp_path):
    lines = writers.JsonLines(tmp_path / "log.jsonl")
    curves = writers.TensorBoard(tmp_path / "curves")

    def run():
        with writers.Several(lines, curves) as both:
            for step in range(1, 101):
                both.write(step, {"loss": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert len(read_lines(tmp_path / "log.jsonl")) == 100
    assert len(read_scalars(tmp_path / "curves")) == 100


def test_several_writers_close_though_one_fails():
    closed = []

    class Broken(writers.Writer):
        def write(self, step, row):
            del step, row

        def close(self):
            closed.append(self)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        writers.Several(Broken(), Broken()).close()
    assert len(closed) == 2


@pytest.mark.parametrize("make", [writers.JsonLines, writers.TensorBoard])
def test_a_place_that_cannot_be_is_an_os_error(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make(tmp_path / "file" / "inside")
