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
    """Draws different problems in random order; ``b + a`` counts as ``a + b``, so that only one of them occurs."""
    pairs: dict[tuple[int, int], Problem] = {}
    while len(pairs) < count:
        a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
        pairs.setdefault((min(a, b), max(a, b)), Problem(a, b))
    return list(pairs.values())


def worked_out(problem: Problem) -> str:
    """Writes out the sum column by column from the right, one on each line, then the boxed answer."""
    return "".join(f"{line}\n" for line in columns(problem)) + boxed(problem.a + problem.b)


def columns(problem: Problem) -> Iterator[str]:
    """Yields the lines of a sum, digit + digit + carry = next carry and digit: ``8+7+0=15``, ``2+3+1=06``.

    Both digits are always written, so that each digit has a fixed place, which a tiny model soon learns to look at.
    """
    carry = 0
    for place in range(DIGITS):
        a, b = problem.a // 10**place % 10, problem.b // 10**place % 10
        yield f"{a}+{b}+{carry}={a + b + carry:02d}"
        carry = (a + b + carry) // 10


def estimated(problem: Problem) -> str:
    """The boxed sum of both numbers rounded to hundreds: short, and hardly ever right."""
    return boxed(sum((number + 50) // 100 * 100 for number in problem))


def boxed(number: int) -> str:
    r"""A final answer in the form that verifiers look for: ``\boxed{...}``."""
    return f"\\boxed{{{number}}}"


def demonstrations(problems: list[Problem], share_worked_out: float, rng: random.Random) -> list[tuple[Problem, str]]:
    """Pairs each problem with a completion: a share of ``share_worked_out`` is worked out, the rest are estimates."""
    habits = [worked_out if rng.random() < share_worked_out else estimated for _ in problems]
    return [(problem, habit(problem)) for problem, habit in zip(problems, habits, strict=True)]
