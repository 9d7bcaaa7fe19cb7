"""Random choices as functions, so that tests can enumerate every choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Chooser = Callable[[Sequence[float]], int]
"""Draws an index from probabilities, which sum to 1 up to rounding."""

MakeChooser = Callable[[int], Chooser]
"""Makes the chooser of a seed."""


def seeded_chooser(seed: int) -> Chooser:
    """Independent draws that depend on the seed alone; an index of probability 0 is never drawn."""
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
