"""Additions of two three-digit numbers, with demonstrations of two kinds: worked out, and estimated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

LOWEST, HIGHEST, DIGITS = 100, 999, 3


class Problem(NamedTuple):
    """Two numbers to add."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}=?"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


def draw(count: int, rng: random.Random) -> list[Problem]:
    """Different problems in random order; ``b + a`` counts as ``a + b`` and does not occur beside it."""
    pairs: dict[tuple[int, int], Problem] = {}
    while len(pairs) < count:
        a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
        pairs.setdefault((min(a, b), max(a, b)), Problem(a, b))
    return list(pairs.values())


def worked_out(problem: Problem) -> str:
    """The sum column by column from the right, a line each, then the boxed answer."""
    return "".join(f"{line}\n" for line in columns(problem)) + boxed(problem.a + problem.b)


def columns(problem: Problem) -> Iterator[str]:
    """Digit + digit + carry = next carry and digit: ``8+7+0=15``, ``2+3+1=06``.

    With both digits written always, each digit has its fixed place: a tiny model soon learns where to look.
    """
    carry = 0
    for place in range(DIGITS):
        a, b = problem.a // 10**place % 10, problem.b // 10**place % 10
        yield f"{a}+{b}+{carry}={a + b + carry:02d}"
        carry = (a + b + carry) // 10


def estimated(problem: Problem) -> str:
    """The sum of both numbers rounded to hundreds, boxed: quickly said and hardly ever right."""
    return boxed(sum((number + 50) // 100 * 100 for number in problem))


def boxed(number: int) -> str:
    """A final answer as verifiers know it."""
    return f"\\boxed{{{number}}}"


def demonstrations(problems: list[Problem], share_worked_out: float, rng: random.Random) -> list[tuple[Problem, str]]:
    """Each problem with a completion; ``share_worked_out`` of them show the steps, the others are estimates."""
    habits = [worked_out if rng.random() < share_worked_out else estimated for _ in problems]
    return [(problem, habit(problem)) for problem, habit in zip(problems, habits, strict=True)]
