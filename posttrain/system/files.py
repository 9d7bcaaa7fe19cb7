"""Files that are whole or absent: atomic writes, rows of JSON, flushing to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.errors import CannotWrite, DataError
from posttrain.system.places import no_plain_file, obstacle


@contextmanager
def writing(path: Path, setting: str = "") -> Iterator[None]:
    """Turns every failure to write inside the block into :class:`CannotWrite`, which names the path and the reason.

    Libraries report a full disk by errors of their own: torch by a RuntimeError, safetensors by its own class.

    Args:
        setting: key of the recipe that names the path, such as ``run.folder``.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = _reason(error, path)
        if not reason:
            raise
        raise CannotWrite(_named(setting, path, reason)) from error


def _named(setting: str, path: Path, reason: str) -> str:
    """The message for a place that cannot be written, with the setting that names another one."""
    problem = f"cannot write {str(path)!r}: {reason}"
    return f"{setting}: {problem}; --{setting}=... names another place" if setting else problem


def _reason(error: Exception, path: Path) -> str:
    """Says why a write failed; empty if the error is no failure to write."""
    if isinstance(error, FileExistsError | NotADirectoryError | FileNotFoundError) and (problem := obstacle(path)):
        return problem
    if isinstance(error, OSError):
        # one without a number is a library's complaint about something else
        return "" if error.errno is None else error.strerror or str(error)
    if isinstance(error, ValueError):
        return "its name has a NUL character" if "null byte" in str(error) else ""
    if isinstance(error, SafetensorError):
        return str(error)
    is_of_torch = any(mark in str(error) for mark in ("PytorchStreamWriter", "inline_container", "file write failed"))
    return "the disk is full, or the file is larger than a limit allows (`ulimit -f`)" if is_of_torch else ""


def check_output(path: Path, setting: str) -> None:
    """Tries whether a file can be written, before anything expensive has started. Nothing is left behind.

    Raises:
        CannotWrite: if not, with the reason.
    """
    with writing(path, setting):
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else no_plain_file(path)
            raise CannotWrite(_named(setting, path, f"it is {kind}"))
        target = _target(path)
        _try_to_write(target.with_name(f".{target.name}.{os.getpid()}.writing"))


def check_output_folder(path: Path, setting: str) -> None:
    """Tries whether files can be written into a folder, before anything expensive has started. Nothing is left behind.

    Raises:
        CannotWrite: if not, with the reason.
    """
    with writing(path, setting):
        if path.exists() and not path.is_dir():
            raise CannotWrite(_named(setting, path, f"it is {no_plain_file(path) or 'a file'} and no folder"))
        _try_to_write(path / f".{os.getpid()}.writing")


def _try_to_write(trial: Path) -> None:
    """Writes a file, and removes it and the folders that had to be made for it."""
    missing = [folder for folder in trial.parents if not folder.exists()]
    trial.parent.mkdir(parents=True, exist_ok=True)
    try:
        trial.write_bytes(b"\n")
    finally:
        trial.unlink(missing_ok=True)
        for folder in missing:
            if not any(folder.iterdir()):  # another process may have begun to use it
                folder.rmdir()


def _target(path: Path) -> Path:
    """The file that is replaced by writing a path: the one that a link leads to."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary file to write, which takes the place of ``path`` at the end of the block.

    A reader sees the old content or all of the new, never a part of it; after an error the old content stays. The
    folder is made if it is missing. A link stays, and what it leads to is replaced. Several processes may write the
    same path.

    Args:
        durable: flush the file to disk before it gets its name, so that it survives a crash of the machine.
    """
    with writing(path):
        target = _target(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which takes the place of ``path`` at the end of the block.

    After an error the old folder stays. A kill between the two renames leaves the old one beside it, as
    ``.<name>.removing``.
    """
    temporary, old = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.removing")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync_tree(temporary)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object on each line, atomically; values that JSON does not have become text."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads a file with a JSON object on each line, such as :func:`write_rows` makes."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def join_files(pieces: Iterable[Path], path: Path) -> None:
    """Writes the contents of files one after another."""
    with path.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole)


def hash_of_files(files: Iterable[Path]) -> str:
    """Hash of the contents of files.

    Raises:
        DataError: if one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            digest.update(hashlib.blake2b(file.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


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
