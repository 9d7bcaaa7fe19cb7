"""Errors that end a run with a message. A UserError is shown without a traceback and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Something in the input is wrong. The message says what, where, and what to do, with one line per problem."""

    code = 2
    """Exit code of the command."""

    def __init__(self, *problems: str | Iterable[str]) -> None:
        self.problems = tuple(
            line for problem in problems for line in ([problem] if isinstance(problem, str) else problem)
        )
        super().__init__("\n".join(self.problems))


class RecipeError(UserError):
    """A recipe, or an override on the command line, that cannot run.

    The message of a problem that is found only when a run starts begins with its key, as in ``policy.model: there is no
    folder 'x'``: the command line puts the place of the key before it.
    """


class DataError(UserError):
    """A dataset, or a row of it, does not have the expected form."""


class CheckFailed(UserError):
    """The result of a check that was asked for is bad. The report is written; the command exits with code 1."""

    code = 1


class NothingSelected(UserError):
    """No prompt of a step passed ``select``, or too few: data, policy and verifiers do not fit together."""

    drawn: tuple[Any, dict[str, list[float | None]]] | None = None
    """This rank's completions, as a batch, and the values of each verifier; they are worth a look."""


class Stopped(KeyboardInterrupt):
    """The end of a command before it is done: by a signal, or at ``run.stop_after``.

    The message of a run says how far it is and where ``--resume`` continues.

    Args:
        code: exit code of the command: 128 and the number of the signal (143 after SIGTERM), or ``OUT_OF_TIME``.
    """

    def __init__(self, message: str = "", code: int = 128 + 2) -> None:
        super().__init__(message, code)  # both, so that pickle can send the error to other ranks
        self.message, self.code = message, code

    def __str__(self) -> str:
        return self.message


class Abandoned(Stopped):
    """The end of a command in the middle of something that took too long to finish after a signal."""


OUT_OF_TIME = 75
"""Exit code of a run that ended at ``run.stop_after``: EX_TEMPFAIL of sysexits.h, "try again later"."""


class CannotWrite(UserError):
    """A file or folder cannot be written: no permission, no space, a name that the disk does not take."""


class VerifierError(RuntimeError):
    """A verifier raised an error, took too long, ended its process, or returned something that is not a number.

    Not the input's fault, so not a :class:`UserError`: a run saves a checkpoint and stops with this message.
    """

    def __init__(
        self, verifier: str, problem: str, place: str = "", row: object = None, completion: str = "", trace: str = ""
    ) -> None:
        self.verifier, self.problem, self.place = verifier, problem, place
        self.row, self.completion, self.trace = row, completion, trace
        lines = [f"verifier {verifier!r} {problem}"]
        lines += [f"  row: {place}"] if place else []
        lines += [f"  columns: {_shorten(repr(row))}"] if row is not None else []
        lines += [f"  completion: {_shorten(repr(completion))}"] if completion else []
        lines += ["  " + line for line in trace.rstrip().splitlines()]
        lines += ["  (`on_error: skip` leaves such completions out of the update and counts them)"]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[VerifierError], tuple[object, ...]]:
        """Pickles all arguments, to send the error to other ranks: pickle would rebuild it from its message alone."""
        return type(self), (self.verifier, self.problem, self.place, self.row, self.completion, self.trace)


def _shorten(text: str, longest: int = 600) -> str:
    """Cuts the middle out of a long text."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
