"""Processes that take turns: each program that is compared runs in its own process and waits before each step."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from posttrain.system.memory import peak_bytes


class Worker:
    """A worker process, as the process that started it sees it."""

    def __init__(self, work: Callable[[Any, Turns], None], settings: Any, log: Path) -> None:
        self.log = log
        context = multiprocessing.get_context("spawn")
        self._connection, worker_end = context.Pipe()
        self._process = context.Process(target=run_worker, args=(work, settings, worker_end, log))
        self._process.start()
        worker_end.close()

    def turn(self) -> dict[str, Any]:
        """Lets the worker take one turn and returns its report.

        Raises:
            RuntimeError: if the worker died; the message ends with its log.
        """
        try:
            self._connection.send("go")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.log.stem} ended with exit code {self._process.exitcode}:\n{tail}") from None

    def stop(self) -> None:
        """Kills the worker."""
        self._process.kill()
        self._process.join()


class Turns:
    """The worker's end of the connection: ``wait`` for the go-ahead, then ``done`` with the report of the turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started: float | None = None
        self._cpu = 0.0

    def wait(self) -> None:
        """Waits for the go-ahead and starts the clock."""
        self._connection.recv()
        self._cpu, self._started = time.process_time(), time.perf_counter()

    def done(self, **extra: Any) -> None:
        """Reports the turn that ``wait`` began. Does nothing if no turn has begun."""
        if self._started is None:
            return
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self._started = None
        self._connection.send({"seconds": seconds, "cpu_seconds": cpu, "peak_memory_mb": peak_memory_mb(), **extra})


def peak_memory_mb() -> float:
    """Peak memory of this process in MiB: of the GPU if there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_bytes() / 2**20


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
    """Entry point of a worker process, whose output goes to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(settings.threads)
    work(settings, Turns(connection))
