"""Tests of prompt samplers: every row is drawn, all processes draw the same rows, and resuming is exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import PromptSampler, by_failure, sequential, uniform
from posttrain.errors import DataError


@given(st.integers(1, 20), st.integers(0, 5), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 5))
def test_uniform_visits_every_row_once_an_epoch_and_resumes_exactly(
    size: int, seed: int, draws: list[int], cut: int
) -> None:
    sampler, resumed = uniform(size=size, seed=seed), uniform(size=size, seed=seed + 1)
    drawn: list[int] = []
    for i, n in enumerate(draws):
        if i == min(cut, len(draws) - 1):
            resumed.state = json.loads(json.dumps(sampler.state))
            assert resumed.draw(n + 7) == (uniform_from(sampler, size, seed)).draw(n + 7)
        drawn += sampler.draw(n)
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    assert drawn == uniform(size=size, seed=seed).draw(sum(draws)), "how rows are asked for does not matter"


def uniform_from(sampler: PromptSampler, size: int, seed: int) -> PromptSampler:
    copy = uniform(size=size, seed=seed)
    copy.state = sampler.state
    return copy


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    drawn = uniform(size=50, seed=0).draw(100)
    assert drawn[:50] != drawn[50:] and drawn[:50] != uniform(size=50, seed=1).draw(50)
    assert sequential(size=3, seed=0).draw(7) == [0, 1, 2, 0, 1, 2, 0]


def test_by_failure_draws_what_fails() -> None:
    """By Kimi's rule, success rates 1, 0.5 and 0 have the weights 0, 0.5 and 1."""
    sampler = by_failure(size=3, seed=0)
    sampler.update([0, 1, 2], [[1.0, 1.0], [1.0, 0.0, float("nan")], [0.0, -5.0]])
    drawn = np.bincount([sampler.draw(1)[0] for _ in range(3000)], minlength=3) / 3000
    assert drawn == pytest.approx([0, 1 / 3, 2 / 3], abs=0.03)
    assert sorted(sampler.draw(3)) == [0, 1, 2], "a solved row comes only when no other is left"


def test_by_failure_unseen_rows_and_floor() -> None:
    sampler = by_failure(size=3, seed=0, unseen=0.5, floor=0.25)
    sampler.update([0, 1], [[1.0], [0.0]])
    drawn = np.bincount([sampler.draw(1)[0] for _ in range(3000)], minlength=3) / 3000
    assert drawn == pytest.approx(np.array([0.25, 1.0, 0.5]) / 1.75, abs=0.03)


def test_by_failure_resumes_exactly() -> None:
    sampler = by_failure(size=20, seed=3)
    for _ in range(4):
        index = sampler.draw(6)
        assert len(set(index)) == 6
        sampler.update(index, [[float(i % 2), 0.3] for i in index])
    resumed = by_failure(size=20, seed=99)
    resumed.state = json.loads(json.dumps(sampler.state))
    assert [resumed.draw(7) for _ in range(3)] == [sampler.draw(7) for _ in range(3)]
    assert len(sampler.draw(45)) == 45, "more than there are rows"


@pytest.mark.parametrize("make", [uniform, sequential, by_failure])
def test_state_of_another_data_set_is_refused(make) -> None:
    sampler = make(size=4, seed=0)
    with pytest.raises(DataError, match="was saved for a dataset of 5 rows, but this one has 4"):
        sampler.state = make(size=5, seed=0).state
    with pytest.raises(ValueError, match="needs rows"):
        make(size=0, seed=0)
