"""Seeds: every random number of a run depends on the recipe's seed and on the place where it is drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence


def sample_seed(seed: int, sample: int) -> int:
    """Seed of one sample of a prompt: a fixed 63-bit mix of both (SplitMix64), equal on every machine and engine."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + sample * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


OPPONENTS = 1 << 33
"""Added to a seed's place: the opponent's samples do not share random numbers with the policy's."""


def prompt_seeds(seed: int, step: int, round_: int, positions: Sequence[int]) -> list[int]:
    """A seed a prompt, from its place in the step alone: the same rollouts on one process as on several."""
    base = sample_seed(sample_seed(seed, step), round_)
    return [sample_seed(base, position) for position in positions]


def derived_seed(seed: int, *places: int) -> int:
    """A seed for a place within a search: round, particle, node."""
    for place in places:
        seed = sample_seed(seed, place)
    return seed


CHOICES = 1 << 32
"""Added to a seed's place: choices among particles do not share random numbers with the engine."""


def seeds_of(seed: int, prompts: int) -> list[int]:
    """A seed for each prompt of a request; the first one's is the request's own."""
    return [seed, *(derived_seed(seed, place) for place in range(1, prompts))]


class FreshSeeds:
    """Seeds of prompts where a caller gives none: a stream that depends on its own seed alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def unless(self, given: Sequence[int] | None, count: int) -> Sequence[int]:
        """The seeds that were given, or ``count`` new ones."""
        return [self._random.getrandbits(63) for _ in range(count)] if given is None else given
