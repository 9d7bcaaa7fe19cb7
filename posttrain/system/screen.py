"""Standard output and error that a program outlives: their reader has gone, or their disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """A text stream whose failure ends the display and not the program.

    After the first failed write the stream's file is ``/dev/null``, so that neither libraries nor the end of the
    interpreter fail on it again.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._failed = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text, or drops it if the stream has failed."""
        try:
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, or does nothing if it has failed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._failed:
            return
        self._failed = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._name == "stdout" and not isinstance(error, BrokenPipeError):
            print(f"standard output cannot be written ({error.strerror}): going on without it", file=sys.stderr)


@contextmanager
def lasting_screen() -> Iterator[None]:
    """Makes standard output and error last inside the block: a failed write to them is no error."""
    before = sys.stdout, sys.stderr
    replaced = [
        stream is not None and stream is original for stream, original in zip(before, _originals(), strict=True)
    ]
    if replaced[0]:
        sys.stdout = LastingStream(sys.stdout, "stdout")  # pyright: ignore[reportAttributeAccessIssue]
    if replaced[1]:
        sys.stderr = LastingStream(sys.stderr, "stderr")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _originals() -> tuple[Any, Any]:
    """The interpreter's own streams: those that a caller has put in their place, such as a test's, are left alone."""
    return sys.__stdout__, sys.__stderr__
