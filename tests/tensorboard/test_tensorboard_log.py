"""What TensorBoard is given of a run, whatever ends it."""

import contextlib
import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

import optax_stability as ost
from optax_stability.tensorboard import TensorBoardLog

ROWS = {1: {"loss": 3.5, "noise/low": math.nan}, 2: {"loss": math.inf, "noise/low": 7}}


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
    with contextlib.closing(TensorBoardLog(tmp_path / "curves")) as curves:
        for step, row in ROWS.items():
            curves.write(step, row | {"origin": "a file"})
    scalars = read_scalars(tmp_path / "curves")
    assert scalars == [(1, "loss", 3.5), (2, "noise/low", 7.0)]


def test_tensorboard_gets_histograms_over_the_exponents(tmp_path):
    x = jnp.array([0.0, 0.75, 0.75, 3.0, 2.0**-50])
    tx = ost.record("grad", histogram=True)
    counts = ost.metrics(tx.update({"w": x}, tx.init({"w": x}))[1])["grad/histogram"]
    nothing, bad = np.zeros(50), np.full(50, np.nan)
    with contextlib.closing(TensorBoardLog(tmp_path / "curves")) as curves:
        curves.write(4, {"w": np.asarray(counts), "zero": nothing, "nan": bad})
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


@pytest.mark.parametrize(("resume_after", "first"), [(None, 0), (0, 1), (7, 8)])
def test_tensorboard_hides_what_will_be_written_again(tmp_path, resume_after, first):
    TensorBoardLog(tmp_path, resume_after=resume_after).close()
    starts = [
        event.step
        for event in read_events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [first]


def test_after_a_rewind_a_curve_goes_back(tmp_path):
    with contextlib.closing(TensorBoardLog(tmp_path)) as curves:
        for step in (1, 2, 1):
            curves.write(step, {"loss": 1.0})
    assert [step for step, *_ in read_scalars(tmp_path)] == [1, 2, 1]


def test_a_killed_run_loses_no_more_than_ten_seconds(tmp_path, monkeypatch):
    log_module = sys.modules[TensorBoardLog.__module__]
    seconds = iter(range(0, 1000, 4))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(seconds))
    curves = TensorBoardLog(tmp_path)
    for step in range(1, 21):
        curves.write(step, {"loss": 1.0})
        (path,) = tmp_path.iterdir()
        # At two looks at the clock per flush: every third step.
        assert len(read_scalars(tmp_path)) >= step - 3, path
    curves.close()
    assert len(read_scalars(tmp_path)) == 20


def test_a_full_disk_costs_points_and_nothing_else(tmp_path, monkeypatch):
    curves = TensorBoardLog(tmp_path)
    curves.write(1, {"loss": 1.0})

    def full(event):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(curves._events, "write_event", full)
        curves.write(2, {"loss": 1.0})
    curves.write(3, {"loss": 1.0})
    curves.close()
    assert [step for step, *_ in read_scalars(tmp_path)] == [1, 3]


def test_a_place_that_cannot_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TensorBoardLog(tmp_path / "file" / "inside")
