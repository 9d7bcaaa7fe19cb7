r"""Compares expressions with math-verify, in a worker process and within limits.

math-verify reads LaTeX into sympy, which may take minutes and gigabytes for a line of text. So a text is measured
before it is read, and a comparison has ``CPU_SECONDS``.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

CPU_SECONDS = 2.0  # of one comparison; then the answer is wrong
LONGEST_EXPRESSION = 400  # characters
DEEPEST_NESTING = 12  # of brackets
LARGEST_EXPONENT = 100  # written as a number; a power of a power must be smaller
LONGEST_DIGITS = 50  # of one number
LARGEST_FACTORIAL = 100

_DIGITS = re.compile(r"\d+")
_POWER = re.compile(r"(?:\^|\*\*)\s{0,3}[{(]?\s{0,3}-?(\d+)")
_POWERS_OF_POWERS = re.compile(
    r"(?:\^|\*\*)\s{0,3}\d+\s{0,3}(?:\^|\*\*)|(?:\^|\*\*)\s{0,3}[{(][^{}()]{0,80}\d\s{0,3}(?:\^|\*\*)"
)
_FACTORIAL = re.compile(r"(\d+)\s{0,3}!")
_BRACKETS = re.compile(r"[{(\[]|[})\]]")
_FORBIDDEN = re.compile(
    r"__|\\(?:input|include|write|def|csname)\b|(?:import|lambda|eval|exec)\b|!\s?!|\\(?:sum|prod|int|lim|binom)(?=.{0,80}\d{4})"
)


def too_large(text: str) -> bool:
    """True if an expression is not worth reading: too long, too deep, with powers that would fill the memory."""
    if len(text) > LONGEST_EXPRESSION or _FORBIDDEN.search(text) or _POWERS_OF_POWERS.search(text):
        return True
    if any(len(digits) > LONGEST_DIGITS for digits in _DIGITS.findall(text)):
        return True
    if any(int(exponent) > LARGEST_EXPONENT for exponent in _POWER.findall(text)):
        return True
    if any(int(number) > LARGEST_FACTORIAL for number in _FACTORIAL.findall(text)):
        return True
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "{([" else -1
        deepest = max(deepest, depth)
    return deepest > DEEPEST_NESTING


def equal_expressions(gold: str, written: str) -> bool:
    """True if math-verify finds two expressions in LaTeX equal within ``CPU_SECONDS``."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # at every start it warns that the limit is missing
    latex = [LatexExtractionConfig()]
    try:
        with cpu_limit(CPU_SECONDS):
            expected, found = (parse(f"\\boxed{{{text}}}", latex, parsing_timeout=0) for text in (gold, written))
            return bool(verify(expected, found, timeout_seconds=0))
    except OutOfTime:
        return False


AGAIN = 0.2
"""CPU seconds until the error is raised again. Python drops an error that is raised while an object is deleted."""


class OutOfTime(BaseException):
    """The error for a comparison that took too long. No ``except Exception`` of a library stops it."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`OutOfTime` in the main thread after so many CPU seconds of this process.

    In a worker process the process ends a second later: a call into C does not see the error. The pool starts another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    usual = signal.signal(signal.SIGVTALRM, stop)
    usual_end = signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN)
    if multiprocessing.parent_process() is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds + 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGVTALRM, usual)
        signal.signal(signal.SIGPROF, usual_end)
