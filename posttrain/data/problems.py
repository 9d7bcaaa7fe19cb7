"""Collecting what is wrong with a data set, so that one message names it all."""

from __future__ import annotations

from typing import Any

from posttrain.errors import DataError

MOST = 10


class Problems:
    """Problems of a data set, in the order they were found; the first few are worded, the rest counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, place: str, problem: str) -> None:
        self._count += 1
        if self._count <= MOST:
            self._lines.append(f"{place}: {problem}")

    def __len__(self) -> int:
        return self._count

    def raise_if_any(self) -> None:
        """
        Raises:
            DataError: with a line a problem, where there are any.
        """
        if not self._count:
            return
        more = self._count - len(self._lines)
        raise DataError(self._lines, [f"... and {more} more"] if more else [])


def shown(value: Any, longest: int = 60) -> str:
    """A value with its type, for a message: ``72 (a number)``."""
    text = repr(value)
    if value is None:
        return "null"
    return f"{text if len(text) <= longest else text[:longest] + '...'} ({kind_of(value)})"


def kind_of(value: Any) -> str:
    """The type of a value in words that do not depend on the file format."""
    kinds = ((bool, "true or false"), (int | float, "a number"), (str, "text"), (dict, "an object"), (list, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), type(value).__name__)
