"""Refills of a step: how many prompts are drawn, and which are kept."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rollout.refills import first_groups, prompts_to_draw


def test_the_first_round_asks_for_a_step_and_the_next_for_what_is_expected_to_be_needed() -> None:
    assert prompts_to_draw(32, 0, 0, 352) == 32
    assert prompts_to_draw(32, 32, 32, 352) == 0
    # 16 of 32 passed, so the rate is 17/34: 41 prompts give 20.5 on average, with a deviation of 3.2
    assert prompts_to_draw(32, 16, 32, 352) == 32  # never more than were drawn before
    assert prompts_to_draw(32, 24, 64, 352) == 28  # rate 25/66: 28 give 10.6 with a deviation of 2.6
    assert prompts_to_draw(32, 31, 32, 352) == 2
    assert prompts_to_draw(4, 0, 40, 44) == 4  # the limit of the step


@given(asked=st.integers(1, 64), kept=st.integers(0, 64), drawn=st.integers(1, 300), refills=st.integers(1, 10))
def test_bounds_of_a_round(asked: int, kept: int, drawn: int, refills: int) -> None:
    drawn, most = max(drawn, asked), asked * (1 + refills)
    number = prompts_to_draw(asked, min(kept, asked), drawn, most)
    assert 0 <= number <= max(0, min(drawn, most - drawn))
    if kept < asked and drawn < most:
        assert number >= min(asked - kept, most - drawn)  # enough to fill the step, if all of them pass


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_few_rounds_fill_a_step(rate: float) -> None:
    """Rounds of exactly what is missing would take about log(asked) / -log(1 - rate) of them: 16, 5 and 2."""
    generator, rounds, waste = random.Random(0), [], []
    for _ in range(300):
        kept = drawn = number = surplus = 0
        while size := prompts_to_draw(32, kept, drawn, 352):
            passed = sum(generator.random() < rate for _ in range(size))
            surplus += max(0, kept + passed - 32)
            kept, drawn, number = min(32, kept + passed), drawn + size, number + 1
        assert kept == 32
        rounds.append(number)
        waste.append(surplus)
    assert sum(rounds) / 300 < {0.2: 4.6, 0.5: 3.0, 0.8: 2.3}[rate]
    assert sum(waste) / 300 < 8


def test_the_first_groups_in_the_order_of_drawing_are_kept() -> None:
    """Groups 0, 2, 4 are on this rank and 1, 3, 5 on another one; 0 is not chosen."""
    processes: Any = SimpleNamespace(gather=lambda own: [own, [1, 5]])
    group = torch.tensor([0, 0, 2, 2, 4, 4])
    chosen = torch.tensor([False, False, True, True, True, False])
    assert first_groups(group, chosen, 2, processes)[0].tolist() == [False, False, True, True, False, False]
    kept, number = first_groups(group, chosen, 3, processes)
    assert kept.tolist() == [False, False, True, True, True, False] and number == 3
