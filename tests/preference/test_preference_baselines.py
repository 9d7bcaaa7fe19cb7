"""Baselines, from whole batches before the update: by hand, on several ranks, and on batches that lack completions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from parts_cases import close, examples, halves, on_ranks, seeds
from preference_cases import answers, moved, preferences, whole_loss

from posttrain.batch import Batch, seq_sum
from posttrain.parts.preference import margins
from posttrain.parts.preference.baselines import mismatched, running_mean, sorted_pairs, sorted_reference
from posttrain.parts.preference.terms import pairwise


def with_log_ratios(ratios: list[float], labels: list[float]) -> Batch:
    """Completions of one token, each alone in its group, with these log-ratios of policy and reference."""
    batch = answers([[(0, label)] for label in labels], [1.0])
    logp = torch.zeros(len(ratios), 2).double()
    logp[:, 1] = torch.tensor(ratios)
    return batch.set(logp_old=logp)


def test_mismatched_is_the_mean_of_the_baseline_completions_or_0() -> None:
    batch = with_log_ratios([9.0, -9.0, 0.5, 0.1], [1.0, 0.0, math.nan, math.nan])
    batch = batch.set(baseline_only=torch.tensor([False, False, True, True]))
    close(mismatched(batch), [0.3] * 4)
    assert batch.logp_old is not None
    close(mismatched(batch.set(logp_old=-batch.logp_old)), [0.0] * 4)
    with pytest.raises(ValueError, match="no completion of another prompt"):
        mismatched(batch.set(baseline_only=torch.zeros(4).bool()))


def test_running_mean_remembers_all_batches_and_its_state_brings_it_back() -> None:
    part = running_mean()
    close(part(with_log_ratios([1.0, 3.0, 100.0], [1.0, 0.0, math.nan])), [2.0] * 3)
    again = running_mean()
    again.state = dict(part.state)
    for each in (part, again):
        close(each(with_log_ratios([8.0], [1.0])), [4.0])


@given(seed=seeds)
@examples(2)
def test_ranks_share_their_baselines(seed: int) -> None:
    batch = preferences(seed, groups=6, plain=True).set(baseline_only=torch.arange(12) % 3 == 0)
    for make in (lambda: mismatched, running_mean):
        alone = make()(batch)
        batches = [batch[index] for index in halves(batch)]
        for mine in on_ranks(batches, lambda part, make=make: make()(part)):
            close(mine, alone[: len(mine)])


def test_sorted_reference_pairs_the_kth_margins() -> None:
    """Margins of the policy (3, 1, 2), of the reference (0, 5, -1): the largest meets 5, the next 0, the least -1."""
    batch = answers([[(0, 1.0), (0, 0.0)] for _ in range(3)], [1.0])
    policy, reference = torch.zeros(6, 2).double(), torch.zeros(6, 2).double()
    policy[::2, 1], reference[::2, 1] = torch.tensor([3.0, 1, 2]).double(), torch.tensor([0.0, 5, -1]).double()
    batch = batch.set(logp_old=policy, logp_ref=reference)
    close(sorted_reference(batch), [5.0, 0, -6, 0, 1, 0])


def test_sorted_pairs_regroups_by_rank_and_wants_as_many_of_both() -> None:
    batch = with_log_ratios([3.0, 1.0, 2.0, -1.0, 0.0, 5.0, 7.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, math.nan])
    assert sorted_pairs(batch).tolist() == [2, 0, 1, 0, 1, 2, 9]
    with pytest.raises(ValueError, match="3 chosen completions cannot be paired with 2"):
        sorted_pairs(batch[[0, 1, 2, 3, 4]])


@given(seed=seeds)
@examples(5)
def test_one_pair_alone_is_sorted_already(seed: int) -> None:
    batch = preferences(seed, groups=1, plain=True).set(baseline_only=torch.zeros(2).bool())
    outputs = moved(batch, seed)
    batch = batch.set(logp_old=outputs.logp.detach())
    sorted_batch = batch.set(baseline=sorted_reference(batch))

    def term(out, b):
        return pairwise(out, b, margin=(margins.baseline,))

    assert batch.logp_ref is not None
    assert seq_sum(batch.logp_ref, batch.mask).abs().sum() > 0
    close(whole_loss([(1.0, term)], outputs, sorted_batch), whole_loss([(1.0, pairwise)], outputs, batch))
    regrouped = batch.set(group=sorted_pairs(batch))
    close(whole_loss([(1.0, pairwise)], outputs, regrouped), whole_loss([(1.0, pairwise)], outputs, batch))
