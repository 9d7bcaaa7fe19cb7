"""Distributions of population decoders, from their definitions, as scalar loops over everything that can happen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from exact_world import String, World

Select = Callable[[Sequence[float]], list[float]]
"""Scores of candidates to the probability that each is taken."""


def argmax(scores: Sequence[float]) -> list[float]:
    first = list(scores).index(max(scores))
    return [float(index == first) for index in range(len(scores))]


def softmax_at(strength: float) -> Select:
    def select(scores: Sequence[float]) -> list[float]:
        powers = [math.exp(strength * score) for score in scores]
        return [power / sum(powers) for power in powers]

    return select


def blocks_from(world: World, string: String, block: int) -> dict[String, float]:
    """Distribution over strings that are one block longer."""
    distribution = {string: 1.0}
    for _ in range(block):
        distribution = {
            after: probability * p
            for s, probability in distribution.items()
            for after, p in (
                [(s, 1.0)] if world.ended(s) else [((*s, a), p) for a, p in enumerate(world.next_distribution(s))]
            )
        }
    return distribution


def select_blockwise(
    world: World, values: Mapping[String, float], *, block: int, count: int, select: Select
) -> dict[String, float]:
    """Draws ``count`` blocks from the base distribution, keeps one of them, and repeats this until the string ends."""
    ended: dict[String, float] = {}
    going = {(): 1.0}
    while going:
        after: dict[String, float] = {}
        for string, probability in going.items():
            distribution = blocks_from(world, string, block)
            for drawn in itertools.product(distribution.items(), repeat=count):
                joint = probability * math.prod(p for _, p in drawn)
                chances = select([values[s] for s, _ in drawn])
                for (s, _), chance in zip(drawn, chances, strict=True):
                    place = ended if world.ended(s) else after
                    place[s] = place.get(s, 0.0) + joint * chance
        going = {s: p for s, p in after.items() if p > 0}
    return ended


def best_of_n(world: World, n: int) -> dict[String, float]:
    """Distribution of best-of-n: P(y) = F(r(y))^n - F(< r(y))^n (no ties); F: distribution of the reward under p0."""
    distribution = {}
    for y in world.strings:
        upto = sum(p for z, p in world.strings.items() if world.reward[z] <= world.reward[y])
        distribution[y] = upto**n - (upto - world.strings[y]) ** n
    return distribution


def beam(world: World, values: Mapping[String, float], width: int) -> String:
    """Beam search: extends all kept strings by all next tokens and keeps the ``width`` strings of largest value."""
    kept: list[String] = [()]
    while not all(world.ended(s) for s in kept):
        pool = [after for s in kept for after in ([s] if world.ended(s) else blocks_from(world, s, 1))]
        kept = sorted(pool, key=lambda s: -values[s])[:width]
    return kept[0]


def best_first(world: World, alpha: float, count: int) -> list[String]:
    """The first ``count`` strings popped from a queue ordered by Σ log p / length^α, older ones first among equals."""
    queue: list[tuple[float, int, String]] = [(0.0, 0, ())]
    popped, number = [], 0
    while queue and len(popped) < count:
        queue.sort(key=lambda entry: (-entry[0], entry[1]))
        _, _, string = queue.pop(0)
        popped.append(string)
        if world.ended(string):
            continue
        distribution = world.next_distribution(string)
        for a in sorted(range(world.vocabulary), key=lambda a: -distribution[a]):
            after = (*string, a)
            logp = sum(math.log(world.next_distribution(after[:n])[after[n]]) for n in range(len(after)))
            number += 1
            queue.append((logp / len(after) ** alpha, number, after))
    return popped
