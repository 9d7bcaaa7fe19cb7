"""Workers that take turns: what is compared lives in processes of its own, each told when to take one more step."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Worker:
    """A worker process, seen from outside."""

    def __init__(self, work: Callable[[Any, Turns], None], settings: Any, log: Path) -> None:
        self.log = log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_worker, args=(work, settings, theirs, log))
        self._process.start()
        theirs.close()

    def turn(self) -> dict[str, Any]:
        """Lets the worker take one turn.

        Raises:
            RuntimeError: with the end of its log, if it died.
        """
        try:
            self._connection.send("go")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.log.stem} ended with exit code {self._process.exitcode}:\n{tail}") from None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


class Turns:
    """A worker's side of taking turns: ``wait`` for the go-ahead, then ``done`` with what the turn brought."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started: float | None = None
        self._cpu = 0.0

    def wait(self) -> None:
        self._connection.recv()
        self._cpu, self._started = time.process_time(), time.perf_counter()

    def done(self, **extra: Any) -> None:
        """Reports the turn that ``wait`` began; does nothing before the first."""
        if self._started is None:
            return
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self._started = None
        self._connection.send({"seconds": seconds, "cpu_seconds": cpu, "peak_memory_mb": peak_memory_mb(), **extra})


def peak_memory_mb() -> float:
    """Most memory that this process has held: on the GPU where there is one, else resident. MiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # unlike ru_maxrss, this starts anew at exec
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


class Timed:
    """A function that adds up the seconds spent in it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds, self.cpu_seconds = call, 0.0, 0.0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return self.call(*arguments, **keywords)
        finally:
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu


def run_worker(work: Callable[[Any, Turns], None], settings: Any, connection: Connection, log: Path) -> None:
    """Entry point of a worker process; what it prints goes to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(settings.threads)
    work(settings, Turns(connection))
