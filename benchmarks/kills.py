"""Kills a forked process at the k-th change that it makes to the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR


def kill_at_change(moment: int, folder: Path, work: Callable[[], Any]) -> bool:
    """Forks, does the work, and kills the process at its ``moment``-th change below the folder; False if it ended."""
    child = os.fork()
    if child == 0:
        try:
            count_changes(folder, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == moment else None)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def count_changes(folder: Path, on_change: Callable[[int], Any]) -> None:
    """Calls ``on_change`` with its number before every change that this process makes below the folder.

    A change is a file that is opened for writing, or a name that appears, moves or disappears. The hook stays for the
    rest of the process.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (writes or event in CHANGES) and str(folder) in path_of(event, arguments):
            count += 1
            on_change(count)

    sys.addaudithook(hook)


def path_of(event: str, arguments: tuple[Any, ...]) -> str:
    """The absolute path that a call of the system is about; removal of a tree names files relative to a descriptor."""
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return ""
    name, descriptor = os.fsdecode(arguments[0]), arguments[-1] if event not in ("open", "os.truncate") else -1
    if not os.path.isabs(name) and descriptor >= 0:
        name = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name)
    return os.path.abspath(name)
