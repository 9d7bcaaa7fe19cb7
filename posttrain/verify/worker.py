"""Runs inside a worker process: finds verifiers by their spec and calls them one at a time.

It imports little on purpose, because every new worker waits for these imports.
"""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from posttrain.recipe.resolve import resolve
from posttrain.verify import leftovers
from posttrain.verify.output import redirect


@dataclass(frozen=True)
class Source:
    """The place where a worker finds a verifier."""

    spec: str  # file.py:name or package.module.name
    options: Mapping[str, Any]
    call: Callable[..., Any] | None  # the verifier itself, if it has no spec


@dataclass(frozen=True, slots=True)
class Failed:
    """The result of a call that did not return a number."""

    problem: str  # completes the sentence "verifier 'x' ..."
    trace: str = ""


Outcome = float | None | Failed
_verifiers: list[Callable[..., Any] | Failed] = []


def start(sources: Sequence[Source], writer: Connection, mark: str) -> None:
    """Loads the verifiers into this process. One that cannot be found fails when it is called, with its traceback.

    Args:
        writer: pipe that takes the output of this process.
        mark: mark of the pool, by which processes are found that a verifier left behind.
    """
    leftovers.lead(mark)
    redirect(writer)
    _verifiers[:] = [_find(source) for source in sources]


def ready() -> None:
    """Does nothing. The pool calls it first, so that its workers start."""


def call_one(index: int, completion: str, columns: Mapping[str, Any]) -> Outcome:
    """Calls one verifier on one completion."""
    return guarded(_verifiers[index], lambda call: as_value(call(completion, **columns)))


def call_batch(index: int, size: int, arguments: Mapping[str, Any]) -> list[float | None] | Failed:
    """Calls one verifier with TRL's signature on all completions."""
    return guarded(_verifiers[index], lambda call: as_values(call(**arguments), size))


def guarded(call: Callable[..., Any] | Failed, use: Callable[[Callable[..., Any]], Any]) -> Any:
    """Returns ``use(call)``, or the error as a :class:`Failed`, which can be sent to another process."""
    if isinstance(call, Failed):
        return call
    try:
        return use(call)
    except (Exception, SystemExit) as error:
        return describe(error)


def describe(error: BaseException) -> Failed:
    """Turns an error into a :class:`Failed` with its traceback, without the frames of this module."""
    if isinstance(error, BadValue):
        return Failed(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    while len(frames) > 1 and frames[0].filename == __file__:
        del frames[0]
    trace = "".join(["Traceback (most recent call last):\n", *frames.format(), *traceback.format_exception_only(error)])
    return Failed(f"raised {type(error).__name__}: {error}", trace)


class BadValue(TypeError):
    """The error for a verifier that returned neither a finite number nor None."""


def as_value(value: Any) -> float | None:
    """Returns a verifier's value as a float; None stays None.

    Raises:
        BadValue: if it is neither None nor a finite number (a boolean and a scalar array are numbers).
    """
    if value is None:
        return None
    if inspect.iscoroutine(value):
        value.close()
        raise BadValue("returned a coroutine: declare it `async def`")
    if inspect.isgenerator(value):
        raise BadValue("returned a generator: use `return` in place of `yield`")
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise BadValue(f"returned {value!r:.80} ({type(value).__name__}); it must return a number or None")
    number = float(value)
    if not math.isfinite(number):
        raise BadValue(f"returned {number}; it must return a finite number or None")
    return number


def as_values(values: Any, size: int) -> list[float | None]:
    """Returns the values of a TRL-style function as floats.

    Raises:
        BadValue: if they are not one number or None for each completion.
    """
    if isinstance(values, Mapping | str | bytes | set | frozenset):
        kind = type(values).__name__
        raise BadValue(f"returned {values!r:.80} ({kind}); it must return a list with a number for each completion")
    if inspect.isgenerator(values):
        raise BadValue("returned a generator: use `return [...]` in place of `yield`")
    try:
        elements = list(values)
    except TypeError:
        raise BadValue(f"returned {values!r:.80} ({type(values).__name__}); it must return a list") from None
    if len(elements) != size:
        raise BadValue(f"returned {len(elements)} values for {size} completions")
    return [as_value(value) for value in elements]


def _find(source: Source) -> Callable[..., Any] | Failed:
    if source.call is not None:
        return source.call
    try:
        target = resolve(source.spec)
    except (Exception, SystemExit) as error:
        return describe(error)
    if isinstance(target, type):
        return target(**source.options)
    return functools.partial(target, **source.options)
