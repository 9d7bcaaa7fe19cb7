"""Writes a generated document, or checks that it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(file: Path, text: str) -> int:
    """Writes a document; with ``--check`` on the command line it compares it instead.

    Returns:
        The exit code: 1 if the document was compared and is out of date, otherwise 0.
    """
    if "--check" not in sys.argv[1:]:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != text:
        print(f"{file.parent.name}/{file.name} is out of date: run python scripts/{Path(sys.argv[0]).name}")
        return 1
    return 0
