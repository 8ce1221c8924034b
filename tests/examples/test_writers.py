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
