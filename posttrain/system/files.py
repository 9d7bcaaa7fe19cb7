"""Files that are whole or absent: atomic writes, rows of JSON, flushing to disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write, which takes the place of ``path`` at the end of the block.

    A reader sees the old content or all of the new, never a part of it; after an error the old content stays. The
    folder is made if it is missing. Several processes may write the same path.

    Args:
        durable: flush the file to disk before it gets its name, so that it survives a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object on each line, atomically; values that JSON does not have become text."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a file with a JSON object on each line, such as :func:`write_rows` makes."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def json_number(value: float) -> float | None:
    """Returns the number, or ``None`` for NaN and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def sync_tree(directory: Path) -> None:
    """Flushes a directory and all files and directories in it to disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Flushes one file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
