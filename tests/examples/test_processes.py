"""Processes that train one model together, over ``jax.distributed`` on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import survival
from tiers import full

SMALL_GPT = Path(__file__).parent / "small_gpt.py"
STEPS = 40
FLAGS = f"""--steps {STEPS} --warmup-steps 5 --batch-size 8 --microbatches 2
--eval-batches 1 --eval-every 20 --checkpoint-every 5 --sample-tokens 0""".split()
PATIENCE = 400  # Seconds, for machines that do other things as well.


def free_port():
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


class Job:
    """What a scheduler does with the processes of a run."""

    def __init__(self, folder, *, processes, devices, mesh):
        """Starts them, each with some devices."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": os.pathsep.join(sys.path),  # The examples are on it.
        }
        command = [sys.executable, SMALL_GPT, *FLAGS, "--out", folder, "--mesh", mesh]
        port = free_port()
        self.folder, self.logs = folder, []
        self.processes = []
        for i in range(processes):
            place = ["--processes", f"localhost:{port},{i}/{processes}"]
            log = folder.with_name(f"{folder.name}-{port}-{i}.log")
            with log.open("w") as output:
                process = subprocess.Popen(
                    command + place * (processes > 1),
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)
            self.logs.append(log)

    def _until(self, holds):
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, self.printed()
            time.sleep(0.1)

    def printed(self):
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for_step(self, step):
        """Until it is logged, or a process has ended."""
        self._until(
            lambda: (
                any(row["step"] >= step for row in rows(self.folder))
                or any(process.poll() is not None for process in self.processes)
            )
        )
        assert all(process.poll() is None for process in self.processes), self.printed()

    def wait(self):
        """Until all have ended; how."""
        self._until(lambda: all(each.poll() is not None for each in self.processes))
        return [process.returncode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
        self.wait()


@pytest.fixture
def start(tmp_path):
    """Starts jobs, and leaves none behind."""
    jobs = []

    def start(name, **settings):
        jobs.append(Job(tmp_path / name, **settings))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def rows(folder):
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def losses(folder):
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


@full
def test_processes_train_together_and_survive(start):
    """Two lose one to a kill; four go on and are asked to stop; one finishes.

    What eight devices saved is read by four, and then by one.
    """
    job = start("run", processes=2, devices=4, mesh="data=4,model=2")
    job.wait_for_step(8)
    job.processes[1].kill()
    job.kill()  # As schedulers do, once one is gone.
    killed = max(losses(job.folder))

    job = start("run", processes=4, devices=1, mesh="data=2,fsdp=2")
    job.wait_for_step(killed + 3)
    job.processes[2].send_signal(signal.SIGTERM)
    assert job.wait() == [130] * 4, job.printed()
    assert "resuming from there" in job.logs[0].read_text()
    (says,) = (x for x in job.logs[0].read_text().split("\n") if "saved at step" in x)
    saved = int(says.split("saved at step ")[1].split(";")[0])
    assert "held-out" not in job.logs[1].read_text()  # One of them prints.

    job = start("run", processes=1, devices=1, mesh="data=1")
    assert job.wait() == [0], job.printed()
    assert f"is at step {saved}: resuming" in job.printed()
    reference = start("reference", processes=1, devices=1, mesh="data=1")
    assert reference.wait() == [0], reference.printed()
    found, expected = losses(job.folder), losses(reference.folder)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[STEPS] < found[1] - 0.1
    survival.count(survival.KILLS)
    survival.count(survival.STOPS)
