"""Ends a program by signals: at once, or at the next moment at which nothing is half done.

SIGINT (Ctrl-C), SIGTERM (Slurm, Kubernetes) and SIGHUP (a closed terminal) all mean: end soon. ``end_by_signals``
makes each of them raise :class:`posttrain.errors.Stopped` in the main thread. A training run handles them later, with
``postponed``; the parts of a step that change nothing are ``interruptible`` all the same.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from posttrain.errors import Abandoned, Stopped

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 30.0
"""Default seconds between SIGTERM and the SIGKILL that follows: of Slurm, Kubernetes and ``torch.distributed.run``."""
SAME = 2.0
"""Seconds in which further signals count as the first: a launcher forwards what its group got already."""


@dataclass
class _State:
    """The signal that arrived, and what is to be done about it. There is one for the process."""

    arrived: int = 0  # number of the first signal; 0: none
    time: float = 0.0  # when it arrived
    postponing: bool = False
    overdue: bool = False  # True once a postponed signal has waited for too long
    grace: float = GRACE
    last_words: Callable[[], str] | None = None  # what to print if the process must exit at once
    timers: tuple[threading.Timer, ...] = ()


_state = _State()


@contextmanager
def end_by_signals() -> Iterator[None]:
    """Lets SIGINT, SIGTERM and SIGHUP raise :class:`Stopped` inside the block; a second signal exits at once.

    Signals that the process ignores stay ignored (``nohup`` ignores SIGHUP). Only the main thread gets signals; in
    other threads the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in ENDING}
    _reset()
    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        _reset()


def _reset() -> None:
    global _state
    for timer in _state.timers:
        timer.cancel()
    _state = _State()


def _on_signal(number: int, frame: Any) -> None:
    if _state.overdue:
        _state.overdue = False
        raise Abandoned("", 128 + _state.arrived)
    if _state.arrived:
        if time.monotonic() - _state.time > SAME:
            exit_now()
        return
    _state.arrived, _state.time = number, time.monotonic()
    if not _state.postponing:
        raise Stopped("", 128 + number)
    _set_timers()


def _set_timers() -> None:
    """Gives up what a postponed signal waits for after two thirds of the grace, and the process just before its end."""
    if _state.arrived == signal.SIGINT:  # a person waits, and can press Ctrl-C again
        return
    times = ((_state.grace * 2 / 3, _abandon), (_state.grace * 9 / 10, exit_now))
    _state.timers = tuple(threading.Timer(seconds, function) for seconds, function in times)
    for timer in _state.timers:
        timer.daemon = True
        timer.start()


def _abandon() -> None:
    _state.overdue = True
    os.kill(os.getpid(), _state.arrived)  # wakes the main thread, where the handler raises


def exit_now() -> None:
    """Says the last words, ends all child processes and exits without any cleaning up."""
    words = _state.last_words() if _state.last_words is not None else "stopped"
    os.write(2, f"{signal_name(128 + _state.arrived)}: {words}\n".encode())
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(sys.__stdout__.fileno(), b"\x1b[?25h")  # a live table hides the cursor
    for child in psutil.Process().children(recursive=True):
        if not _is_resource_tracker(child):
            _kill(child)
    os._exit(128 + _state.arrived)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """True for Python's own process that removes the semaphores of those that ended; it ends by itself."""
    from multiprocessing import resource_tracker

    return process.pid == getattr(resource_tracker._resource_tracker, "_pid", None)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return  # it ended by itself


@contextmanager
def postponed(*, grace: float = GRACE, last_words: Callable[[], str] | None = None) -> Iterator[None]:
    """Notes a signal inside the block, and does nothing else about it: the block asks :func:`arrived`.

    After two thirds of ``grace`` the handler raises :class:`Abandoned` wherever the main thread is, and just before the
    end of ``grace`` the process exits, after it has printed ``last_words``.
    """
    before = _state.postponing, _state.grace, _state.last_words
    _state.postponing, _state.grace, _state.last_words = True, grace, last_words
    try:
        yield
    finally:
        _state.postponing, _state.grace, _state.last_words = before


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets a signal raise :class:`Stopped` inside the block although it is in a ``postponed`` one."""
    postponing = _state.postponing
    try:
        if postponing:
            _state.postponing = False
            raise_if_arrived()
        yield
    finally:
        _state.postponing = postponing
        if postponing and _state.arrived and not _state.timers:
            _set_timers()


def arrived() -> int:
    """Returns the exit code that the signal which arrived asks for; 0 if none has."""
    return 128 + _state.arrived if _state.arrived else 0


def raise_if_arrived() -> None:
    """Raises :class:`Stopped` if a signal has arrived."""
    if _state.arrived:
        raise Stopped("", arrived())


def signal_name(code: int) -> str:
    """Name of the signal of an exit code, such as SIGTERM for 143; empty for other codes."""
    return signal.Signals(code - 128).name if code > 128 else ""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays signals that raise until the block has ended. A second one is not delayed.

    Python raises between any two instructions of the main thread: also between putting something into another thread's
    queue and waking that thread, which then waits for ever, and the run with it. So short calls that hand something to
    a thread or a process (a tracker's writer, a verifier's worker) run in such a block. Only the main thread gets
    signals; in other threads the block changes nothing.
    """
    handlers = {int(number): signal.getsignal(number) for number in ENDING}
    usual = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or not usual:
        yield
        return
    waiting: list[tuple[int, Any]] = []

    def put_off(number: int, frame: Any) -> None:
        if waiting:
            usual[number](number, frame)
        waiting.append((number, frame))

    for number in usual:
        signal.signal(number, put_off)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if waiting:
            usual[waiting[0][0]](*waiting[0])
