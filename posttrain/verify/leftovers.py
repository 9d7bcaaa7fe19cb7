"""Ends the processes that verifiers leave behind: sandboxes, servers and shells that would live on after the run.

A worker process leads a session of its own and inherits the orphans among its descendants (Linux), so that it can end
all of them when it ends. What a worker left that was killed itself is found by its session, by a mark in its
environment (programs that it started), or by a file that it has open (copies of the worker itself).
"""

from __future__ import annotations

import ctypes
import multiprocessing.util
import os
import signal
import sys
import tempfile
from collections.abc import Collection, Iterable

import psutil

MARK = "POSTTRAIN_VERIFIER_OF"
"""Variable in the environment of what a worker starts. Its value is the mark of the worker's pool: an empty file."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def lead(mark: str) -> None:
    """Makes this worker process the one that ends its descendants; called once, before a verifier is loaded.

    Args:
        mark: mark of the pool.
    """
    os.open(mark, os.O_RDONLY | os.O_CREAT)  # stays open here and in forks of this process, and nowhere else
    if hasattr(os, "setsid") and os.getsid(0) != os.getpid():
        os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ[MARK] = mark
    multiprocessing.util.Finalize(None, end_descendants, exitpriority=100)


def new_mark() -> str:
    """Makes the mark of a pool: an empty file that only its workers open. The pool removes it."""
    handle, path = tempfile.mkstemp(prefix="posttrain-verifiers-")
    os.close(handle)
    return os.path.realpath(path)


def end_descendants() -> None:
    """Ends all descendants of this process, and says which."""
    tell(_killed(psutil.Process().children(recursive=True)))


def end_leftovers(workers: Collection[int], mark: str) -> None:
    """Ends what is left of workers that have ended, and says which.

    Args:
        workers: ids of the worker processes of a pool.
        mark: mark of the pool.
    """
    tell(_killed(process for process in psutil.process_iter() if _belongs(process, workers, mark)))


def _belongs(process: psutil.Process, sessions: Collection[int], mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        if os.getsid(process.pid) in sessions or process.environ().get(MARK) == mark:
            return True
        return any(file.path == mark for file in process.open_files())
    except (psutil.Error, OSError):
        return False  # it has ended, or belongs to another user


def _killed(processes: Iterable[psutil.Process]) -> list[str]:
    """Kills processes, and returns the commands of those that were running."""
    names = []
    for process in processes:
        try:
            name = process.name()
            running = process.status() != psutil.STATUS_ZOMBIE
            process.send_signal(signal.SIGKILL)
        except (psutil.Error, OSError):
            continue
        if running:
            names.append(name)
    return names


def tell(names: list[str]) -> None:
    """Says which processes were ended."""
    if names:
        some = ", ".join(dict.fromkeys(names[:5])) + (", ..." if len(names) > 5 else "")
        count = "1 process" if len(names) == 1 else f"{len(names)} processes"
        print(f"verifiers left {count} behind ({some}), now ended", file=sys.stderr, flush=True)
