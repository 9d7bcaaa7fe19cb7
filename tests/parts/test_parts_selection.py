"""Selection and rewards: against scalar loops, golden numbers, brute force, invariances."""

from __future__ import annotations

import itertools
import math
from statistics import pvariance

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, pad, rough_batch, seeds
from random_batch import make_random_batch
from torch import Tensor

from posttrain.batch import OPTIONAL_FIELDS, Batch, Finish
from posttrain.parts import rewards, selection

NAN = math.nan


def scored_batch(scores: list[float], group: list[int], baseline_only: list[bool] | None = None) -> Batch:
    n = len(scores)
    batch = make_random_batch(0, groups=1, size=n)
    return batch.set(
        score=torch.tensor(scores, dtype=torch.float32),
        reward=torch.tensor(scores, dtype=torch.float32),
        group=torch.tensor(group),
        baseline_only=torch.tensor(baseline_only or [False] * n),
    )


def with_lengths(batch: Batch, lengths: list[int]) -> Batch:
    """Completions with these numbers of chosen tokens and no prompt."""
    column = torch.arange(max(lengths))
    mask = column < torch.tensor(lengths)[:, None]
    nothing = torch.zeros(mask.shape)
    empty = dict.fromkeys(("logp_sampler", "step_reward", *OPTIONAL_FIELDS), nothing)
    return batch.set(
        tokens=nothing.long(), mask=mask, length=torch.tensor(lengths), step_id=torch.where(mask, 0, -1), **empty
    )


@given(seed=seeds)
@examples()
def test_mixed_groups_equal_the_scalar_loops(seed: int) -> None:
    batch = rough_batch(seed)
    assert selection.mixed_groups(batch).nonzero().squeeze(-1).tolist() == reference.mixed_groups(reference.read(batch))


def test_mixed_groups_truth_table() -> None:
    """All right, all wrong, mixed, mixed only by an unscored one, mixed only by a greedy one, mixed beside these."""
    scores = [1, 1, 1, 0, 0, 0, 1, 0, 1, 1, NAN, 1, 1, 1, 0, 1, 0, NAN]
    group = [i // 3 for i in range(18)]
    greedy = [i in (14, 17) for i in range(18)]
    kept = selection.mixed_groups(scored_batch(scores, group, greedy)).tolist()
    assert [kept[3 * i : 3 * i + 3] for i in range(6)] == [[x] * 3 for x in (False, False, True, False, False, True)]


def test_mixed_groups_decide_on_the_verifiers_and_not_on_shaped_rewards() -> None:
    batch = scored_batch([1, 1], [0, 0])
    assert not selection.mixed_groups(batch.set(reward=torch.tensor([1.0, 0.5]))).any()


@given(seed=seeds, keep=st.integers(2, 5))
@examples()
def test_max_variance_equals_brute_force(seed: int, keep: int) -> None:
    """No other choice of ``keep`` scored completions of a group has a larger variance of rewards."""
    batch = rough_batch(seed, groups=2, size=6)
    kept = selection.max_variance(batch, keep=keep)
    assert bool(kept[batch.baseline_only].all())
    for group in batch.group.unique().tolist():
        candidates = batch.reward[(batch.group == group) & batch.scored & ~batch.baseline_only].tolist()
        found = batch.reward[(batch.group == group) & kept & ~batch.baseline_only].tolist()
        assert len(found) == min(keep, len(candidates))
        if len(found) >= 2:
            best = max(pvariance(subset) for subset in itertools.combinations(candidates, len(found)))
            assert pvariance(found) == pytest.approx(best, abs=1e-9)


def test_max_variance_takes_both_ends() -> None:
    batch = scored_batch([0.0, 0.4, 0.5, 0.6, 1.0, NAN], [0] * 6)
    assert selection.max_variance(batch, keep=2).tolist() == [True, False, False, False, True, False]
    with pytest.raises(ValueError, match="at least 2"):
        selection.max_variance(batch, keep=1)


def test_finished_keeps_what_ended_by_itself_and_baselines() -> None:
    batch = scored_batch([1, 1, 1, 1], [0] * 4, [False, False, False, True])
    batch = batch.set(finish=torch.tensor([Finish.STOPPED, Finish.LENGTH, Finish.ABORTED, Finish.LENGTH]))
    assert selection.finished(batch).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "part", [selection.mixed_groups, selection.finished, lambda b: selection.max_variance(b, keep=2)]
)
@given(seed=seeds)
@examples(10)
def test_selection_does_not_depend_on_order_padding_or_other_groups(part, seed: int) -> None:
    batch = rough_batch(seed)
    whole = part(batch)
    assert torch.equal(part(pad(batch, 2, NAN)), whole)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(part(batch[order]), whole[order])
    for group in batch.group.unique():
        assert torch.equal(part(batch[batch.group == group]), whole[batch.group == group])
    assert part(batch[torch.zeros_like(batch.baseline_only)]).tolist() == []


@given(seed=seeds, limit=st.integers(2, 8), buffer=st.integers(1, 8))
@examples()
def test_overlong_equals_the_scalar_loops(seed: int, limit: int, buffer: int) -> None:
    batch = rough_batch(seed)
    if buffer > limit:
        with pytest.raises(ValueError, match="0 < buffer <= limit"):
            rewards.overlong(batch, limit=limit, buffer=buffer)
        return
    rows = reference.read(batch)
    expected = [reference.overlong(rows, i, limit, buffer) for i in range(len(batch))]
    close(rewards.overlong(batch, limit=limit, buffer=buffer), expected)


def test_golden_overlong() -> None:
    """With limit 100 and buffer 20: nothing up to 80 tokens, half at 90, all from 100 on."""
    batch = with_lengths(scored_batch([1] * 5, [0] * 5), [10, 80, 90, 100, 120])
    assert rewards.overlong(batch, limit=100, buffer=20).tolist() == [0, 0, -0.5, -1, -1]


@given(seed=seeds)
@examples()
def test_length_equals_the_scalar_loops(seed: int) -> None:
    batch = rough_batch(seed)
    rows = reference.read(batch)
    close(rewards.length(batch), [reference.length_reward(rows, i) for i in range(len(batch))])


def test_golden_length() -> None:
    """Lengths 100 to 400, the first two correct: λ = .5, .1667, -.1667, -.5, and never positive for a wrong one."""
    batch = with_lengths(scored_batch([1, 1, 0, 0], [0] * 4), [100, 200, 300, 400])
    close(rewards.length(batch), [0.5, 1 / 6, -1 / 6, -0.5])
    close(rewards.length(batch.set(score=torch.tensor([0.0, 1, 1, 1]))), [0, 1 / 6, -1 / 6, -0.5])
    same = with_lengths(scored_batch([1, 0], [0, 0]), [7, 7])
    assert rewards.length(same).tolist() == [0, 0]


@given(seed=seeds)
@examples()
def test_kl_penalty_is_minus_the_log_ratio(seed: int) -> None:
    batch = rough_batch(seed)
    rows = reference.read(batch)
    expected = rows.zeros()
    for i in range(len(batch)):
        for t in rows.tokens(i):
            expected[i][t] = rows.logp_ref[i][t] - rows.logp_old[i][t]
    close(rewards.kl_penalty(batch), expected)
    close(rewards.kl_penalty(batch, level="sequence"), [sum(row) for row in expected])


@pytest.mark.parametrize("part", [lambda b: rewards.overlong(b, limit=6, buffer=4), rewards.length, rewards.kl_penalty])
@given(seed=seeds)
@examples(10)
def test_rewards_do_not_depend_on_order_padding_or_other_groups(part, seed: int) -> None:
    batch = rough_batch(seed)
    whole: Tensor = part(batch)
    padded: Tensor = part(pad(batch, 2, NAN))
    assert torch.equal(padded if whole.dim() == 1 else padded[:, :-2], whole)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(part(batch[order]), whole[order])
    for group in batch.group.unique():
        assert torch.equal(part(batch[batch.group == group]), whole[batch.group == group])
