"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files with a container's limit and use of memory, of both versions of Linux's control groups."""


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return 0
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(process: int | str = "self") -> int:
    """Most memory that a process has held so far; 0 where the system does not say, or the process has ended.

    ``ru_maxrss`` is another number: a program that a large one has started begins with the peak of that one.

    Args:
        process: its number.
    """
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def free_bytes() -> int | None:
    """Memory that processes can still take from the machine, or from its container; None if the system does not say."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    entries = (line.split() for line in table.read_text().splitlines())
    free = next((int(entry[1]) * 1024 for entry in entries if entry[0] == "MemAvailable:"), None)
    for limit, used in CGROUPS:
        if free is not None and Path(limit).exists() and (most := Path(limit).read_text().strip()).isdigit():
            free = min(free, int(most) - int(Path(used).read_text()))
    return free
