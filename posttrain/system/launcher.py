"""The launcher that started this process: when it is gone, the run ends too."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends
PROGRAMS = ("accelerate", "accelerate-launch", "torchrun")
MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run")


def end_with_launcher() -> None:
    """Makes Linux send this process a SIGTERM when Accelerate's launcher ends; without a launcher it does nothing.

    ``accelerate launch`` of one process does not pass signals on. Without this the run would go on alone.
    """
    parent = psutil.Process().parent()
    if sys.platform != "linux" or parent is None or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent.pid:  # it ended just before
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: psutil.Process) -> bool:
    """True for ``accelerate launch`` and ``torchrun``, as programs or modules."""
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(Path(word).name in PROGRAMS or word in MODULES for word in words)
