"""Checkpoints: whole or not there, the newest and the best, and none that is past."""

import contextlib
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import quick_only

from optax_stability.orbax import Checkpoints, _checkpoints, select_checkpoints

STATE = {"w": np.arange(16, dtype=np.float32), "n": np.array(7, np.int32)}


def progress(step, batch=None, loss=math.nan, **more):
    batch = step if batch is None else batch
    return {"step": step, "batch": batch, "eval/loss": loss} | more


def batches(line):
    return [each["batch"] for each in line]


def folders(tmp_path):
    return sorted(int(path.name) for path in tmp_path.iterdir())


@contextlib.contextmanager
def its_threads_end():
    """Orbax writes, deletes and cleans up in threads of its own."""
    before = set(threading.enumerate())
    yield
    # Some may only be about to start, and cannot be joined yet.
    latest = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < latest
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    with its_threads_end():
        yield


def test_what_counts_is_the_newest_and_the_best():
    found = [progress(n, loss=loss) for n, loss in enumerate([3, 1, 2, math.nan, 2])]
    assert batches(select_checkpoints(found, 2)) == [4, 3, 1]
    assert batches(select_checkpoints(found[2:], 2)) == [4, 3]  # A tie.
    assert batches(select_checkpoints(reversed(found), 9)) == [4, 3, 2, 1, 0]
    assert select_checkpoints([], 2) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(loss):
    found = [progress(0, loss=loss), progress(1, loss=9), progress(2), progress(3)]
    assert batches(select_checkpoints(found, 1)) == [3, 1]


def test_what_a_rewind_went_back_past_does_not_count_and_does_not_crowd_out():
    # From step 30 back to step 10, and on behind batch 50.
    found = [progress(n, loss=9 - n) for n in (0, 10, 20, 30)]
    found += [progress(10, 50, loss=-1), progress(20, 60)]
    assert batches(select_checkpoints(found, 3)) == [60, 50, 0]
    assert batches(select_checkpoints(found, 1)) == [60, 50]  # The best of the line.


def test_an_interim_checkpoint_counts_only_while_it_is_the_newest():
    found = [progress(0), progress(4), progress(6, interim=True, loss=-1)]
    assert batches(select_checkpoints(found, 2)) == [6, 4, 0]
    assert batches(select_checkpoints([*found, progress(8)], 2)) == [8, 4]


def test_a_checkpoint_is_what_was_saved(tmp_path):
    said = progress(3, 5, 1.5, policy={"losses": [1.0, None]}, settings={"a": [1, "b"]})
    with Checkpoints(tmp_path) as saved:
        saved.save(STATE, said)
        assert saved.available() == [said]
    with Checkpoints(tmp_path) as saved:
        assert saved.available() == [said]
        chex.assert_trees_all_equal(saved.load(said, like=STATE), STATE)
        chex.assert_trees_all_equal(saved.load(said), STATE)


def test_a_checkpoint_keeps_what_a_donating_step_overwrites(tmp_path):
    step = jax.jit(lambda state: state + 1, donate_argnums=0)
    # Large enough that a copy in the background could be too late.
    state = step(jnp.zeros(2**22))
    with Checkpoints(tmp_path) as saved:
        saved.save({"w": state}, progress(0))
        for _ in range(5):
            state = step(state)
        w = saved.load(saved.available()[0])["w"]
    assert (np.asarray(w) == 1).all()
    assert float(state[0]) == 6


def test_the_newest_and_the_best_are_kept_also_when_it_is_opened_again(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, math.nan, 2.0, math.inf]):
        with Checkpoints(tmp_path, keep=2) as saved:
            saved.save(STATE, progress(step, loss=loss))
    assert folders(tmp_path) == [1, 4, 5]


def test_what_is_there_already_is_not_written_again(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(STATE, progress(1))
        saved.save({"w": np.zeros(3)}, progress(1, loss=1))
        assert "w" in saved.load(saved.available()[0], like=STATE)
        assert math.isnan(saved.available()[0]["eval/loss"])


def test_what_a_rewind_abandons_is_deleted(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step in (0, 10, 20, 30):
            saved.save(STATE, progress(step, loss=9 - step))
        saved.save(STATE, progress(10, 50, loss=-1))
        assert batches(saved.available()) == [50]  # Step 0 made room for step 30.
    assert folders(tmp_path) == [50]


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    """At any moment of a save or of a deletion."""
    with Checkpoints(tmp_path, keep=9) as saved:
        for step in range(6):
            saved.save(STATE, progress(step))
    # 7 was being written, under another name until it is whole; 0 and 1 were being
    # deleted, which has no fixed order.
    half = tmp_path / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", half)
    shutil.rmtree(half / "state")
    shutil.rmtree(tmp_path / "0" / "metrics")
    shutil.rmtree(tmp_path / "1" / "state")
    with Checkpoints(tmp_path, keep=3) as saved:
        assert batches(saved.available()) == [5, 4, 3]
        saved.save(STATE, saved.available()[0])  # As every run begins.
        assert not [n for n in (0, 1, 2) if (tmp_path / str(n)).exists()]
        assert batches(saved.available()) == [5, 4, 3]
        saved.save(STATE, progress(6))
        assert batches(saved.available()) == [6, 5, 4]
        chex.assert_trees_all_equal(saved.load(saved.available()[0], like=STATE), STATE)
    assert folders(tmp_path) == [4, 5, 6]


def test_looking_disturbs_no_run_that_is_writing(tmp_path):
    half = tmp_path / "7.orbax-checkpoint-tmp"
    with Checkpoints(tmp_path, keep=9) as saved:
        for step in range(3):
            saved.save(STATE, progress(step))
        saved.available()
        half.mkdir()
        with (
            its_threads_end(),
            Checkpoints(tmp_path, keep=1, read_only=True) as looking,
        ):
            assert batches(looking.available()) == [2]
        assert half.exists()
        half.rmdir()
    assert folders(tmp_path) == [0, 1, 2]


def test_a_state_is_restored_onto_other_devices(tmp_path):
    eight = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    four = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[2:6])
    split = NamedSharding(eight, PartitionSpec("data"))
    copies = NamedSharding(eight, PartitionSpec())
    twice = NamedSharding(four, PartitionSpec(("model", "data")))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with Checkpoints(tmp_path) as saved:
        saved.save({"w": jax.device_put(STATE["w"], split)}, progress(0))
        for sharding in (split, copies, twice, one):
            like = {"w": jax.device_put(np.zeros(16, np.float32), sharding)}
            restored = saved.load(saved.available()[0], like=like)["w"]
            assert restored.sharding == sharding
            np.testing.assert_array_equal(restored, STATE["w"])


def test_a_place_that_cannot_be_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "inside")


# --- damage, and disks that are full -----------------------------------------------

# Large enough that a limit on the size of a file hits it, and nothing else.
LARGE = {"w": np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)}


def save_steps(folder, steps, state=STATE):
    with Checkpoints(folder) as saved:
        for step in steps:
            saved.save(state, progress(step))


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [cut_short, flip_a_bit, empty, type(Path()).unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@quick_only("cut_short")
def test_damage_in_any_file_is_found_and_the_one_before_is_taken(tmp_path, damage):
    folder = tmp_path / "checkpoints"
    save_steps(folder, [1, 2])
    names = [p.relative_to(folder) for p in (folder / "2").rglob("*") if p.is_file()]
    assert len(names) > 8
    for name in names:
        if damage is type(Path()).unlink and name.name == "SHA256SUMS":
            continue  # As if a process had been killed before it was written.
        copy, told = tmp_path / str(name).replace("/", "-") / "checkpoints", []
        shutil.copytree(folder, copy)
        damage(copy / name)
        with Checkpoints(copy, report=told.append) as saved:
            newest = saved.newest()
            assert newest is not None
            assert newest["step"] == 1
            chex.assert_trees_all_equal(saved.load(newest, like=STATE), STATE)
            (says,) = told
            aside = copy.with_name("checkpoints-damaged") / "2"
            assert says.startswith("checkpoint 2 is damaged: ")
            assert says.endswith(f"; it is kept in {aside}")
            assert "\n" not in says
            assert saved.damaged == ["2"]
            assert aside.is_dir()
            # The run goes on, and comes to the same batch again.
            saved.save(STATE, progress(2))
            assert batches(saved.available()) == [2, 1]
            assert saved.newest() == saved.available()[0]
        assert len(told) == 1


def test_a_checkpoint_without_checksums_is_read_to_see_that_it_can_be(tmp_path):
    folder, told = tmp_path / "checkpoints", []
    save_steps(folder, [1, 2, 3])
    for step in (2, 3):
        (folder / str(step) / "SHA256SUMS").unlink()
    largest = max((folder / "3").rglob("d/*"), key=lambda path: path.stat().st_size)
    cut_short(largest)
    with Checkpoints(folder, report=told.append) as saved:
        assert saved.newest() == saved.available()[0]
        assert batches(saved.available()) == [2, 1]
    assert [says[:24] for says in told] == ["checkpoint 3 is damaged:"]


def test_what_was_damaged_twice_is_kept_twice(tmp_path):
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        save_steps(folder, [2])
        cut_short(folder / "2" / "metrics" / "metrics")
        with pytest.warns(UserWarning, match="checkpoint 2 is damaged: its progress"):
            saved = Checkpoints(folder)
        assert saved.newest() is None
        saved.close()
    assert saved.damaged == ["2", "2-again"]


def test_looking_moves_nothing(tmp_path):
    folder, told = tmp_path / "checkpoints", []
    save_steps(folder, [1, 2, 3])
    cut_short(folder / "3" / "metrics" / "metrics")
    cut_short(folder / "2" / "state" / "_METADATA")
    with Checkpoints(folder, read_only=True, report=told.append) as looking:
        newest = looking.newest()
        assert newest is not None
        assert newest["step"] == 1
        chex.assert_trees_all_equal(looking.load(newest, like=STATE), STATE)
    assert len(told) == 2
    assert all(says.endswith("; it is left out") for says in told)
    assert folders(folder) == [1, 2, 3]
    visible = [path for path in tmp_path.iterdir() if path.name[0] != "."]
    assert visible == [folder]


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond this size: as a full disk, for this process alone."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, caplog):
    caplog.set_level("CRITICAL", logger="absl")
    told = []
    with Checkpoints(tmp_path, keep=1, report=told.append) as saved:
        saved.save(LARGE, progress(1))
        assert saved.wait() is None
        with full_disk():
            saved.save(LARGE, progress(2))
            assert saved.wait() == "File too large"
            (says,) = told
            assert says.startswith("checkpoint 2 could not be saved: File too large;")
            assert folders(tmp_path) == [1]  # What was written is gone.
            saved.save(LARGE, progress(3))
            while len(told) == 1:  # Without waiting for it.
                saved.poll()
            assert batches(saved.available()) == [1]
        saved.save(LARGE, progress(4))
        assert saved.wait() is None
        assert saved.newest() == saved.available()[0]
    assert len(told) == 2
    assert folders(tmp_path) == [4]


def test_a_folder_that_is_removed_under_the_run_is_made_again(tmp_path):
    folder, told = tmp_path / "checkpoints", []
    with Checkpoints(folder, report=told.append) as saved:
        saved.save(STATE, progress(1))
        assert batches(saved.available()) == [1]
        shutil.rmtree(folder)
        assert saved.available() == []
        assert saved.newest() is None
        saved.save(STATE, progress(2))
        assert batches(saved.available()) == [2]
    assert told == []
    assert json.loads((folder / "2" / "metrics" / "metrics").read_text())["step"] == 2


# --- one folder, one process -----------------------------------------------------


def hold(folder):
    """Another process, which writes to the folder until it is killed."""
    code = "import sys, time\n"
    code += "from optax_stability.orbax import Checkpoints\n"
    code += "with Checkpoints(sys.argv[1]):\n"
    code += "    print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_for_one_process_and_free_when_it_is_dead(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    with hold(folder) as process:
        try:
            with pytest.raises(BlockingIOError) as error:
                Checkpoints(folder)
            who = f"process {process.pid} on {socket.gethostname()} since 2"
            assert error.value.strerror.startswith(who)
            assert error.value.strerror.endswith(" writes there")
            with Checkpoints(folder, read_only=True) as looking:
                assert looking.newest() is None
        finally:
            process.kill()  # kill -9
    with Checkpoints(folder) as saved:
        saved.save(STATE, progress(0))
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
            Checkpoints(folder)
    with Checkpoints(folder) as saved:
        assert saved.newest() is not None


def test_a_clock_that_jumps_frees_no_folder(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints"):
        monkeypatch.setattr(time, "strftime", lambda form: "1970-01-01 00:00:00")
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with pytest.raises(BlockingIOError):
            Checkpoints(tmp_path / "checkpoints")


def test_a_folder_that_could_not_be_opened_is_free(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoints.ocp, "CheckpointManager", fail)
        with pytest.raises(RuntimeError, match="not today"):
            Checkpoints(tmp_path / "checkpoints")
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.newest() is None


def test_a_number_of_checkpoints_that_cannot_be_is_explained(tmp_path):
    with pytest.raises(ValueError, match="keep=0 must be an integer of at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_run_can_end_after_a_save_that_failed(tmp_path, caplog):
    caplog.set_level("CRITICAL", logger="absl")
    told = []
    with full_disk(), Checkpoints(tmp_path, report=told.append) as saved:
        saved.save(LARGE, progress(1))
    assert len(told) == 1
    assert folders(tmp_path) == []


def test_without_room_for_checksums_the_checkpoint_is_kept(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    told = []
    with Checkpoints(tmp_path, keep=1, report=told.append) as saved:
        saved.save(STATE, progress(1))
        saved.wait()
        monkeypatch.setattr(_checkpoints, "write_checksums", fail)
        saved.save(STATE, progress(2))
        assert saved.wait() is None
        assert saved.newest() == saved.available()[0]
        chex.assert_trees_all_equal(saved.load(saved.available()[0], like=STATE), STATE)
    assert folders(tmp_path) == [2]
    assert told == []
