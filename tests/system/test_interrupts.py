"""Tests of Ctrl-C at any moment: no other thread is left waiting."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from posttrain.errors import Abandoned, Stopped
from posttrain.output.tracking import Trackers, read_metrics
from posttrain.system.interrupts import end_by_signals, postponed, uninterrupted


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    """Installs Python's usual handler of Ctrl-C, whichever handler the test runner has."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        ctrl_c()
        done.append("the rest of the block")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_waits_for_the_outermost_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            ctrl_c()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_second_ctrl_c_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        ctrl_c()
        done.append("first")
        ctrl_c()
        done.append("second")
    assert done == ["first"]


def test_an_error_of_the_block_is_raised_without_ctrl_c():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        print(1 / 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_the_program_ignores_or_leaves_to_the_system_stays_so(handler):
    signal.signal(signal.SIGINT, handler)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is handler


def test_in_other_threads_it_does_nothing():
    seen = []

    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_trackers_close_after_ctrl_c_at_any_moment(tmp_path):
    """Without the block a few closes in a hundred wait for ever for TensorBoard's writer."""
    moments = random.Random(0)
    before = signal.signal(signal.SIGALRM, lambda number, frame: ctrl_c())
    try:
        for trial in range(150):
            step, trackers = 0, Trackers(["tensorboard"], tmp_path / str(trial))
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.002, 0.006))
                while True:
                    step += 1
                    trackers.log(step, {"reward/mean": 1.0, "kl": 2.0, "loss": 3.0})
            closing = threading.Thread(target=trackers.close, daemon=True)
            closing.start()
            closing.join(timeout=20)
            assert not closing.is_alive(), f"trial {trial}: closing waits for ever"
            assert len(read_metrics(tmp_path / str(trial))) in (step - 1, step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class SignalledInDestructor:
    """An object that gets a signal while Python destroys it: what a handler raises there is dropped."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10_000))  # the handler runs between two instructions


def swallow() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10_000))
    except BaseException:
        return


@pytest.mark.parametrize("lose", [SignalledInDestructor, swallow])
def test_a_stop_that_was_dropped_is_raised_again(lose, capsys):
    with pytest.raises(Stopped) as raised, end_by_signals():
        lose()
        for _ in range(50):
            time.sleep(0.1)
    assert raised.value.code == 143 and capsys.readouterr().err == ""


def test_a_stop_that_is_on_its_way_is_not_raised_again():
    done = []
    with pytest.raises(Stopped), end_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            for _ in range(6):
                time.sleep(0.1)  # such as closing workers
            done.append("closed")
    assert done == ["closed"]


def test_a_postponed_stop_is_not_raised_until_it_is_overdue():
    done = []
    with pytest.raises(Abandoned), end_by_signals(), postponed(grace=1.2):
        os.kill(os.getpid(), signal.SIGTERM)
        for number in range(50):
            time.sleep(0.1)
            done.append(number)
    assert 5 <= len(done) <= 12
