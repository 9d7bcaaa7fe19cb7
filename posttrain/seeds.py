"""Seeds: every random number of a run depends on the recipe's seed and on the place where it is drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence


def sample_seed(seed: int, sample: int) -> int:
    """Seed of one sample of a prompt: a fixed 63-bit mix of seed and sample (SplitMix64), equal on every machine."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + sample * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


OPPONENTS = 1 << 33
"""Offset of the opponent's place, so that its samples do not share random numbers with the policy's."""


def prompt_seeds(seed: int, step: int, round_: int, positions: Sequence[int]) -> list[int]:
    """Seeds of a step's prompts, by their place in the step: one process and several sample the same rollouts."""
    base = sample_seed(sample_seed(seed, step), round_)
    return [sample_seed(base, position) for position in positions]


def derived_seed(seed: int, *places: int) -> int:
    """Seed of a place within a search, such as round, particle and node."""
    for place in places:
        seed = sample_seed(seed, place)
    return seed


CHOICES = 1 << 32
"""Offset of the place of choices among particles, so that they do not share random numbers with the engine."""


def seeds_of(seed: int, prompts: int) -> list[int]:
    """Seeds of a request's prompts; that of the first prompt is the request's own seed."""
    return [seed, *(derived_seed(seed, place) for place in range(1, prompts))]


class FreshSeeds:
    """Seeds for prompts whose caller passes none: a stream that depends only on its own seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def unless(self, given: Sequence[int] | None, count: int) -> Sequence[int]:
        """The seeds that were given, or ``count`` new ones."""
        return [self._random.getrandbits(63) for _ in range(count)] if given is None else given
