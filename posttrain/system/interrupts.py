"""Delays Ctrl-C where it would break a queue that other threads wait for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the block has ended. A second Ctrl-C is not delayed.

    Python raises :class:`KeyboardInterrupt` between any two instructions of the main thread: also between putting
    something into another thread's queue and waking that thread, which then waits for ever, and the run with it. So
    short calls that hand something to a thread or a process (a tracker's writer, a verifier's worker) run in such a
    block. Only the main thread gets signals; in other threads the block changes nothing.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    arrived: list[tuple[int, Any]] = []

    def put_off(number: int, frame: Any) -> None:
        if arrived:
            usual(number, frame)
        arrived.append((number, frame))

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if arrived:
            usual(*arrived[0])
