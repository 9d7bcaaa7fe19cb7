"""Random choices as functions, so that tests can go through every choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Chooser = Callable[[Sequence[float]], int]
"""Draws an index from probabilities, which sum to 1 up to rounding."""

MakeChooser = Callable[[int], Chooser]
"""Makes the chooser of a seed."""


def seeded_chooser(seed: int) -> Chooser:
    """Makes a chooser whose draws depend on the seed alone. It never draws an index of probability 0."""
    uniform = random.Random(seed).random

    def choose(probabilities: Sequence[float]) -> int:
        left = uniform() * sum(probabilities)
        last = 0
        for index, probability in enumerate(probabilities):
            if probability > 0:
                last = index
                left -= probability
                if left < 0:
                    break
        return last

    return choose
