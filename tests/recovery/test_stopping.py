"""Ctrl-C and SIGTERM end a run between two steps; a second one acts at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from optax_stability import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def the_signals_are_handed_back():
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_is_torn_apart(number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested == number.name


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_acts_at_once(first):
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == first.name


def test_signals_are_handed_back_also_after_an_error():
    with pytest.raises(KeyError), StopRequest():
        raise KeyError


def test_in_another_thread_nothing_is_noted():
    requested = []

    def work():
        with StopRequest() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [""]


def test_a_handler_that_is_not_of_python_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


SECOND = """
import os, signal, sys, time
import jax
from optax_stability import StopRequest

def at_once():
    os._exit(7)

blocked = signal.SIGINT if len(sys.argv) == 1 else signal.SIGTERM
with StopRequest(at_once=at_once) as stop:
    def kill_twice(x):
        for _ in range(2):  # From another thread, while the main one waits in XLA.
            os.kill(os.getpid(), blocked)
            time.sleep(0.3)
        time.sleep(60)
        return x
    jax.jit(lambda x: jax.pure_callback(kill_twice, x, x))(1.0).block_until_ready()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_second_signal_acts_even_while_jax_is_busy(number):
    more = [number] * (number == "SIGTERM")
    started = time.monotonic()
    command = [sys.executable, "-c", SECOND, *more]
    done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode in (7, -signal.SIGTERM)
    assert time.monotonic() - started < 50


def test_a_second_signal_is_counted_in_a_thread_of_its_own():
    called = threading.Event()
    with StopRequest(at_once=called.set) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        assert not called.wait(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert called.wait(5)
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(5)
            assert not thread.is_alive()
    assert signal.set_wakeup_fd(-1) == -1
