"""Says how far long work is: nothing for work of a few seconds, then a line every few seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

QUIET = 5.0  # seconds in which nothing is said, and between two lines


@contextmanager
def saying_still(what: str) -> Iterator[None]:
    """Prints ``still importing x, 10 s`` every few seconds while the block runs; nothing if it is quick.

    Only the first process prints, and its workers.

    Args:
        what: what takes so long, such as ``importing my_verifier.py``.
    """
    start, over = time.monotonic(), threading.Event()

    def say() -> None:
        while not over.wait(QUIET):
            print(f"still {what}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=say, name="saying-still", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class LongWork:
    """Counts pieces of work and prints lines such as ``scoring texts: 120 of 2,000, 85 s left``.

    Only the first process prints. Work that ends within five seconds prints nothing. Pieces that are worked on at the
    same time all end late, and a time after the first few of them would be many times too long. So the time is given
    once a batch has ended (:meth:`batch_ended`), or a quarter of all pieces.

    Args:
        name: what is done, in a few words.
        total: number of pieces.
        done: number of pieces that were done before.
        stream: stream to write to. Default: standard error, so that results on standard output stay clean.
        quiet: seconds in which nothing is said, and between two lines.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, *, stream: TextIO | None = None, quiet: float = QUIET
    ) -> None:
        self.name, self.total, self.quiet, self.done = name, total, quiet, done
        self._stream = stream
        self._active = os.environ.get("RANK", "0") == "0"
        self._before = done
        self._start = self._said = time.monotonic()
        self._batches: tuple[int, float] | None = None  # pieces and seconds of the batches that have ended

    def count(self, pieces: int = 1) -> None:
        """Counts pieces that are done."""
        self.done += pieces
        now = time.monotonic()
        if self._active and now - self._said >= self.quiet and self.done < self.total:
            self._said = now
            left = self._seconds_left(now)
            line = f"{self.name}: {self.done:,} of {self.total:,}" + ("" if left is None else f", {left:.0f} s left")
            print(line, file=self._stream or sys.stderr, flush=True)

    def batch_ended(self) -> None:
        """Notes that nothing is being worked on: all pieces that were begun are counted."""
        if self.done > self._before:
            self._batches = self.done - self._before, time.monotonic() - self._start

    def _seconds_left(self, now: float) -> float | None:
        """Seconds that the remaining pieces take; None if too few have ended to tell."""
        seconds = now - self._start
        if self._batches is not None:
            pieces, taken = self._batches
            return max(0.0, taken / pieces * (self.total - self._before) - seconds)
        pieces = self.done - self._before
        return seconds / pieces * (self.total - self.done) if pieces >= (self.total - self._before) / 4 else None
