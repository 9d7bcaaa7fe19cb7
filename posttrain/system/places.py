"""Places that people name: paths with ``~``, paths at which there is nothing, and why."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Replaces ``~`` and ``~user`` by the home folder; a path of an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """True if there is a file or folder; False for names that no file can have, such as one that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def obstacle(path: Path) -> str:
    """Says what stands in the way of a path at which there is nothing; empty if it is simply absent.

    A link may lead nowhere or to itself, and a path may go on below a file.
    """
    try:
        for place in (path, *path.parents):
            if place.is_symlink() and not is_there(place):
                return f"{str(place)!r} is a link to {os.readlink(place)!r}, at which there is nothing"
            if place != path and is_there(place):
                return "" if place.is_dir() else f"{str(place)!r} is no folder"
    except (OSError, ValueError):  # no such name can exist
        pass
    return ""


def no_plain_file(path: Path) -> str:
    """Says what a path names that is neither a folder nor a plain file, and can only be waited for; else empty."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(path.stat().st_mode), "")
