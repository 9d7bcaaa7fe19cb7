"""Says how far long work is: nothing for work of a few seconds, then a line every few seconds."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

QUIET = 5.0  # seconds in which nothing is said, and between two lines


class LongWork:
    """Counts pieces of work and prints lines such as ``scoring texts: 120 of 2,000, 85 s left``.

    Only the first process prints. Work that ends within five seconds prints nothing.

    Args:
        name: what is done, in a few words.
        total: number of pieces.
        stream: stream to write to. Default: standard error, so that results on standard output stay clean.
        quiet: seconds in which nothing is said, and between two lines.
    """

    def __init__(self, name: str, total: int, *, stream: TextIO | None = None, quiet: float = QUIET) -> None:
        self.name, self.total, self.quiet, self.done = name, total, quiet, 0
        self._stream = stream
        self._active = os.environ.get("RANK", "0") == "0"
        self._start = self._said = time.monotonic()

    def count(self, pieces: int = 1) -> None:
        """Counts pieces that are done."""
        self.done += pieces
        now = time.monotonic()
        if self._active and now - self._said >= self.quiet and self.done < self.total:
            self._said = now
            left = (now - self._start) / self.done * (self.total - self.done)
            line = f"{self.name}: {self.done:,} of {self.total:,}, {left:.0f} s left"
            print(line, file=self._stream or sys.stderr, flush=True)
