"""Reads the text of a YAML file, and refuses what is not a recipe before it costs time or memory."""

from __future__ import annotations

import stat
from pathlib import Path

from posttrain.errors import RecipeError

LARGEST = 1_000_000
"""Most bytes of a YAML file. The longest recipe that ships has 3,000."""


def text_of(path: Path) -> str:
    """Reads a file as text.

    Raises:
        FileNotFoundError: if there is no such file.
        RecipeError: if it is no regular file (a pipe would be waited for, a device never ends), it is larger than
            ``LARGEST``, it cannot be read, or it is not text in UTF-8.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError(f"{path}: is a folder; name a recipe in it")
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError(f"{path}: is a pipe, a socket or a device; a recipe is a file")
        if status.st_size > LARGEST:
            size = f"has {status.st_size:,} bytes; a recipe has at most {LARGEST:,}"
            raise RecipeError(f"{path}: {size}. Long lists belong in the dataset")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise  # the caller knows which names are near
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    except OSError as error:  # no permission, a name that is too long, a link to itself, a disk that fails
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # a NUL byte
        raise RecipeError(f"{str(path)!r}: is not the name of a file") from None
