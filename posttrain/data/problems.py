"""Collects the problems of a dataset, so that one message names them all."""

from __future__ import annotations

from typing import Any

from posttrain.errors import DataError

MOST = 10  # problems that a message spells out


class Problems:
    """Problems of a dataset in the order they were found; the first few are spelled out, the rest counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, place: str, problem: str) -> None:
        """Adds a problem of the row at a place, such as ``problems.jsonl:7``."""
        self._count += 1
        if self._count <= MOST:
            self._lines.append(f"{place}: {problem}")

    def __len__(self) -> int:
        return self._count

    def raise_if_any(self) -> None:
        """Raises one error with a line for each problem, if there are any.

        Raises:
            DataError: if there are problems.
        """
        if not self._count:
            return
        more = self._count - len(self._lines)
        raise DataError(self._lines, [f"... and {more} more"] if more else [])


def shown(value: Any, longest: int = 60) -> str:
    """Formats a value with its type for a message: ``72 (a number)``."""
    text = repr(value)
    if value is None:
        return "null"
    return f"{text if len(text) <= longest else text[:longest] + '...'} ({kind_of(value)})"


def kind_of(value: Any) -> str:
    """Names the type of a value in words that do not depend on the file format."""
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "text"), (dict, "an object"), (list, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), type(value).__name__)
