"""A mark by which a verifier says what it can read in a column, so that golds are checked before the first step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Verifier = TypeVar("Verifier", bound=Callable[..., Any])
Reader = Callable[[Any], object]
"""Function that reads a value of a column, and raises ``ValueError`` or ``TypeError`` if it cannot."""


def reads(**readers: Reader) -> Callable[[Verifier], Verifier]:
    """Decorator that gives a verifier a reader for each column: ``@reads(answer=my_function)``.

    Every value of the column is read once, before the first step; values that cannot be read are an error with their
    rows. Users' verifiers may have it too.
    """

    def mark(verifier: Verifier) -> Verifier:
        verifier.reads = readers  # type: ignore[attr-defined]
        return verifier

    return mark


def readers_of(verifier: Callable[..., Any]) -> Mapping[str, Reader]:
    """The readers of a verifier, by column; none if it has not the mark."""
    while isinstance(verifier, functools.partial):
        verifier = verifier.func
    return getattr(verifier, "reads", {})
