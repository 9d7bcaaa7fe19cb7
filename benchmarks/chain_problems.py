"""Generated problems with one line a step, for which the first wrong line of a solution is known exactly.

``27+8-3+9=?`` is solved as ``27+8=35``, ``35-3=32``, ``32+9=41``, ``\\boxed{41}``. Demonstrations contain occasional
slips, and the next line goes on from the wrong number. A model that learned from them does the same. A slip leads to
any other number, so that two slips hardly ever give a right answer.
"""

from __future__ import annotations

import random
from typing import NamedTuple

LOWEST, HIGHEST = 10, 89
SHORTEST, LONGEST = 3, 5


class Chain(NamedTuple):
    """A number and the changes that are added to it in turn; every result is between 0 and 99."""

    start: int
    changes: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}{''.join(f'{change:+d}' for change in self.changes)}=?"

    @property
    def answer(self) -> str:
        return str(self.start + sum(self.changes))


def draw(count: int, rng: random.Random) -> list[Chain]:
    """Draws problems, all of them different."""
    chains: dict[Chain, None] = {}
    while len(chains) < count:
        start, total, changes = rng.randint(LOWEST, HIGHEST), 0, []
        for _ in range(rng.randint(SHORTEST, LONGEST)):
            possible = [c for c in range(-9, 10) if c and 0 <= start + total + c <= 99]
            changes.append(rng.choice(possible))
            total += changes[-1]
        chains.setdefault(Chain(start, tuple(changes)))
    return list(chains)


def worked_out(chain: Chain, slip: float, rng: random.Random) -> str:
    """A solution with one line for each change and the boxed answer; each number is wrong with probability ``slip``.

    Numbers always have two digits, so that a line copies from fixed places, which a tiny model learns quickly.
    """
    lines, now = [], chain.start
    for change in chain.changes:
        right = now + change
        result = rng.choice([n for n in range(100) if n != right]) if rng.random() < slip else right
        lines.append(f"{now:02d}{change:+d}={result:02d}")
        now = result
    return "\n".join([*lines, boxed(now)])


def boxed(number: int | str) -> str:
    """A final answer in the form that verifiers expect."""
    return f"\\boxed{{{number}}}"


def first_wrong(chain: Chain, steps: list[str]) -> int | None:
    """Number, from 0, of the first line that differs from the faultless solution; None if no line differs."""
    right = worked_out(chain, 0.0, random.Random(0)).split("\n")
    differing = (i for i, (line, step) in enumerate(zip(right, steps, strict=False)) if line != step.strip())
    first = next(differing, None)
    if first is None and len(steps) != len(right):
        return min(len(steps), len(right)) - (len(steps) < len(right))
    return first


def parse(prompt: str) -> Chain:
    """The problem that a prompt poses."""
    numbers = prompt.removesuffix("=?").replace("+", " +").replace("-", " -").split()
    return Chain(int(numbers[0]), tuple(int(number) for number in numbers[1:]))
