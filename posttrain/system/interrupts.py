"""Ends a program by signals: at once, or at the next moment at which nothing is half done.

SIGINT (Ctrl-C), SIGTERM (Slurm, Kubernetes) and SIGHUP (a closed terminal) all mean: end soon. ``end_by_signals``
makes each of them raise :class:`posttrain.errors.Stopped` in the main thread. A training run handles them later, with
``postponed``; the parts of a step that change nothing are ``interruptible`` all the same.

Python drops an exception that a handler raises inside a destructor, a weak reference's callback or a callback of the
garbage collector, and some libraries catch everything. So a thread raises ``Stopped`` again until it is on its way.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from posttrain.errors import Abandoned, Stopped

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 30.0
"""Default seconds between SIGTERM and the SIGKILL that follows: of Slurm, Kubernetes and ``torch.distributed.run``."""
SAME = 2.0
"""Seconds in which further signals count as the first: a launcher forwards what its group got already."""


TICK = 0.2
"""Seconds between two looks of the thread that waits for the end after a signal."""


@dataclass
class _State:
    """The signal that arrived, and what is to be done about it. There is one for the process."""

    arrived: int = 0  # number of the first signal; 0: none
    time: float = 0.0  # when it arrived
    postponing: bool = False
    overdue: bool = False  # True once a postponed signal has waited for too long
    repeated: bool = False  # True while the signal on its way is not a new one: the watching thread sent it
    grace: float = GRACE
    last_words: Callable[[], str] | None = None  # what to print if the process must exit at once
    caught: bool = False  # True once ``Stopped`` was caught to be raised later
    over: threading.Event = field(default_factory=threading.Event)  # set at the end of ``end_by_signals``


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
    usual_hook = sys.unraisablehook
    _reset()
    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = _without_stopped(usual_hook)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        sys.unraisablehook = usual_hook
        _reset()


def _reset() -> None:
    global _state
    _state.over.set()
    _state = _State()


def _without_stopped(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Wraps the hook for dropped exceptions: a dropped ``Stopped`` is no news, since it is raised again."""

    def quiet(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, Stopped):
            hook(dropped)

    return quiet


def _on_signal(number: int, frame: Any) -> None:
    state = _state
    if state.repeated and number == state.arrived:
        state.repeated = False
        if not _is_on_its_way(Abandoned if state.overdue else KeyboardInterrupt):
            _raise_if_due(state)
        return
    if state.arrived:
        if time.monotonic() - state.time > SAME:
            exit_now()
        return
    state.arrived, state.time = number, time.monotonic()
    _thread.start_new_thread(_watch, (state,))  # takes no lock, unlike Thread.start, which may just hold one
    _raise_if_due(state)


def _raise_if_due(state: _State) -> None:
    if state.overdue:
        raise Abandoned("", 128 + state.arrived)
    if not state.postponing:
        raise Stopped("", 128 + state.arrived)


def _is_on_its_way(kind: type[BaseException]) -> bool:
    """True if the main thread is in a ``finally``, ``except`` or ``__exit__`` because of an error of this kind."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


def _watch(state: _State) -> None:
    """Waits for the end after a signal, and helps it along.

    A ``Stopped`` that was dropped is raised again. What a postponed signal waits for is given up after two thirds of
    the grace, and the process just before its end; not after Ctrl-C: a person waits, and can press it again.
    """
    while not state.over.wait(TICK):
        waited = time.monotonic() - state.time
        if state.arrived != signal.SIGINT and waited > state.grace * 9 / 10:
            exit_now()
        state.overdue = state.postponing and state.arrived != signal.SIGINT and waited > state.grace * 2 / 3
        if state.overdue or not (state.postponing or state.caught):
            state.repeated = True
            signal.pthread_kill(threading.main_thread().ident or 0, state.arrived)


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
    state = _state
    before = state.postponing, state.grace, state.last_words
    state.postponing, state.grace, state.last_words = True, grace, last_words
    try:
        yield
    finally:
        state.postponing = before[0]
        if not state.arrived:  # otherwise the grace runs already, and what was to be said is still true
            state.grace, state.last_words = before[1:]


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


def arrived() -> int:
    """Returns the exit code that the signal which arrived asks for; 0 if none has."""
    return 128 + _state.arrived if _state.arrived else 0


def received() -> None:
    """Notes that :class:`Stopped` was caught to be raised later: it is not raised again meanwhile."""
    _state.caught = True


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
        if waiting and not _state.repeated:
            usual[number](number, frame)
        if not waiting:
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
