"""The output of worker processes: the beginning goes to standard error, the rest is counted and left out."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

MOST = 200_000  # bytes of a run's verifiers that are shown


class WorkerOutput:
    """Reads what workers and their children write to standard output and standard error, through a pipe.

    ``writer`` is sent to each worker, which puts it in the place of both streams by :func:`redirect`. Bytes are
    counted, not lines: a flood may have no line break.

    Args:
        most: number of bytes that are shown. Default: MOST.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.written = MOST if most is None else most, 0
        self._reader, self.writer = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._read, name="verifier-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while piece := _piece(self._reader):
            room = self.most - self.written
            self.written += len(piece)
            if room > 0:
                _show(piece[:room])
            if room > 0 and self.written > self.most:
                _show(b"\n... further output of verifiers is left out\n")

    def close(self) -> None:
        """Stops reading, and says how much was left out. What a process writes that lives on is lost."""
        self.writer.close()
        self._thread.join(timeout=1)  # ends with the last process that has the pipe
        if (left_out := self.written - self.most) > 0:
            _show(f"verifiers wrote {size(self.written)}, of which {size(left_out)} were left out\n".encode())


def redirect(writer: Connection) -> None:
    """Puts the pipe in the place of this process's standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)  # what a killed process had in its buffer is lost


def _piece(reader: Connection) -> bytes:
    try:
        return os.read(reader.fileno(), 65536)
    except OSError:
        return b""


def _show(text: bytes) -> None:
    try:
        sys.stderr.write(text.decode("utf-8", "replace"))
        sys.stderr.flush()
    except (OSError, ValueError):  # standard error is closed; nobody reads it
        return


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,} bytes"
