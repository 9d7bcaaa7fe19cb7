"""Generated problems of several steps, a line each, of which the first wrong line is known exactly.

``27+8-3+9=?`` is worked out as ``27+8=35``, ``35-3=32``, ``32+9=41``, ``\\boxed{41}``. Demonstrations slip now and
then, and go on from the wrong number as if nothing had happened: so does a model that learned from them. A slip leads
to any other number, so that two slips hardly ever make a right answer.
"""

from __future__ import annotations

import random
from typing import NamedTuple

LOWEST, HIGHEST = 10, 89
SHORTEST, LONGEST = 3, 5


class Chain(NamedTuple):
    """A number, and what is added to it or taken from it in turn; every result lies between 0 and 99."""

    start: int
    changes: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}{''.join(f'{change:+d}' for change in self.changes)}=?"

    @property
    def answer(self) -> str:
        return str(self.start + sum(self.changes))


def draw(count: int, rng: random.Random) -> list[Chain]:
    """Different problems."""
    found: dict[Chain, None] = {}
    while len(found) < count:
        start, total, changes = rng.randint(LOWEST, HIGHEST), 0, []
        for _ in range(rng.randint(SHORTEST, LONGEST)):
            possible = [c for c in range(-9, 10) if c and 0 <= start + total + c <= 99]
            changes.append(rng.choice(possible))
            total += changes[-1]
        found.setdefault(Chain(start, tuple(changes)))
    return list(found)


def worked_out(chain: Chain, slip: float, rng: random.Random) -> str:
    """A line a change and the boxed answer; each number is wrong with probability ``slip``.

    Both digits are written always: what a line copies then has its fixed place, which a tiny model learns soon.
    """
    lines, now = [], chain.start
    for change in chain.changes:
        right = now + change
        result = rng.choice([n for n in range(100) if n != right]) if rng.random() < slip else right
        lines.append(f"{now:02d}{change:+d}={result:02d}")
        now = result
    return "\n".join([*lines, boxed(now)])


def boxed(number: int | str) -> str:
    """A final answer as verifiers know it."""
    return f"\\boxed{{{number}}}"


def first_wrong(chain: Chain, steps: list[str]) -> int | None:
    """Number of the first line that is not what a faultless solution has there, from 0; None: there is none."""
    right = worked_out(chain, 0.0, random.Random(0)).split("\n")
    differing = (i for i, (own, its) in enumerate(zip(right, steps, strict=False)) if own != its.strip())
    first = next(differing, None)
    if first is None and len(steps) != len(right):
        return min(len(steps), len(right)) - (len(steps) < len(right))
    return first


def parse(prompt: str) -> Chain:
    """The problem that a prompt poses."""
    numbers = prompt.removesuffix("=?").replace("+", " +").replace("-", " -").split()
    return Chain(int(numbers[0]), tuple(int(number) for number in numbers[1:]))
