"""Extensions that PyTorch compiles on first use, such as DeepSpeed's optimiser on a CPU: what is waited for is said.

While it compiles, PyTorch keeps a file ``lock`` open in the extension's folder, and other processes wait until that
file is gone. A build that was killed leaves it behind, and they would wait for ever. A lock is dead if no process of
this machine has it open; on a network disk, where another machine may compile, also only after ten minutes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PATIENCE = 2.0
"""Seconds for which a lock may be there before it is spoken of: where nothing has to be compiled, it is gone sooner."""
LONGEST_BUILD = 600.0
"""Seconds after which a lock on a network disk counts as dead, if no process of this machine has it open."""
NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse")
"""Beginnings of the names of file systems that several machines may share."""


@contextmanager
def watched_builds(root: Path | None = None, *, active: bool = True) -> Iterator[None]:
    """Says inside the block which extension is compiled or waited for, and takes dead locks away.

    Args:
        root: folder of all extensions. Default: PyTorch's, which ``TORCH_EXTENSIONS_DIR`` sets.
        active: False does nothing, as on all processes but the first.
    """
    if not active:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(root or build_root(), ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def build_root() -> Path:
    """The folder below which PyTorch compiles extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _watch(root: Path, ended: threading.Event) -> None:
    first_seen: dict[Path, float] = {}
    said: set[Path] = set()
    while True:
        for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
            since = first_seen.setdefault(lock, time.monotonic())
            if time.monotonic() - since < PATIENCE:
                continue
            if is_dead(lock):
                lock.unlink(missing_ok=True)
                _say(f"{lock} was left by a build that was interrupted: it is removed, and the build starts again")
                del first_seen[lock]
            elif lock not in said:
                _say(_what_happens(lock))
                said.add(lock)
        if ended.wait(0.5):
            return


def is_dead(lock: Path) -> bool:
    """True if a lock is there and the build that made it has ended without removing it."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    return holder(lock) is None and (age > LONGEST_BUILD or not _is_shared(lock))


def holder(lock: Path) -> int | None:
    """Process id of a process of this machine that has the file open; None if none has."""
    target = os.path.realpath(lock)
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(descriptor) == target for descriptor in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:  # the process has ended, or belongs to somebody else
            continue
    return None


def _is_shared(path: Path) -> bool:
    """True if a path is on a disk that other machines may use."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    inner = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return inner is None or inner.fstype.startswith(NETWORK)


def _what_happens(lock: Path) -> str:
    name, by = lock.parent.name, holder(lock)
    if by == os.getpid():
        return f"{name} is compiled in {lock.parent}: once on a machine, for about three minutes"
    builder = "another machine" if by is None else f"process {by}"
    return f"waiting for {name}, which {builder} compiles in {lock.parent}; {lock} is removed at its end"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
