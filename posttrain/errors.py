"""Errors that a person made and can mend: shown as a message without a traceback, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something in the input is wrong. The message says what, where, and what to do; one line a problem."""

    def __init__(self, *problems: str | Iterable[str]) -> None:
        self.problems = tuple(
            line for problem in problems for line in ([problem] if isinstance(problem, str) else problem)
        )
        super().__init__("\n".join(self.problems))


class RecipeError(UserError):
    """A recipe, or an override on the command line, that cannot run."""


class DataError(UserError):
    """A data set or a row of it that does not fit."""
