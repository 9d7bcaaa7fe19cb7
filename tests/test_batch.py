"""Tests of Batch: alignment, selection, concatenation, reductions."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from parts_cases import on_ranks

from posttrain.batch import Batch, Finish, broadcast, group_mean, group_std, group_sum, seq_mean, seq_sum
from posttrain.micro_batches import blank_row


def test_set_leaves_the_original_alone(random_batch):
    batch = random_batch(0)
    changed = batch.set(reward=torch.zeros(len(batch)))
    assert changed.reward.abs().sum() == 0 and batch.reward.abs().sum() > 0
    with pytest.raises(AttributeError):
        batch.reward = changed.reward


def test_rows_are_picked_in_the_order_asked_for(random_batch):
    batch = random_batch(1)
    picked = batch[[3, 0, 3]]
    assert picked.texts == ("text 3", "text 0", "text 3")
    assert torch.equal(picked.tokens, batch.tokens[[3, 0, 3]])
    assert len(batch[[]]) == 0
    by_mask = batch[batch.finish == Finish.LENGTH]
    assert len(by_mask) == int((batch.finish == Finish.LENGTH).sum())
    assert [row["answer"] for row in by_mask.rows] == [
        str(i) for i in (batch.finish == Finish.LENGTH).nonzero().squeeze(-1).tolist()
    ]


def test_trim_drops_padding_only(random_batch):
    batch = random_batch(2, columns=20)[[1, 2]]
    trimmed = batch.trim()
    assert trimmed.tokens.shape[1] == int(batch.length.max()) < 20
    assert torch.equal(trimmed.mask.sum(-1), batch.mask.sum(-1))


def test_concatenate_pads_and_puts_back(random_batch):
    first, second = random_batch(3, columns=9), random_batch(4, columns=14)
    joined = Batch.concatenate([first, second])
    assert joined.tokens.shape == (24, 14)
    assert (joined.step_id[:12, 9:] == -1).all() and not joined.mask[:12, 9:].any()
    again = joined[list(range(12))].trim()
    for name in ("tokens", "mask", "logp_sampler", "advantage", "reward", "step_id"):
        assert torch.equal(getattr(again, name), getattr(first.trim(), name)), name


def test_concatenate_refuses_half_filled_fields(random_batch):
    with pytest.raises(ValueError, match="'logp_ref' is filled in 1 of 2"):
        Batch.concatenate([random_batch(0), random_batch(1).set(logp_ref=None)])
    with pytest.raises(ValueError, match="the list of batches is empty"):
        Batch.concatenate([])


def test_group_statistics_leave_out_the_invalid():
    values = torch.tensor([1.0, 3.0, float("nan"), 5.0, 5.0])
    group = torch.tensor([7, 7, 7, 2, 2])
    valid = ~values.isnan()
    assert group_sum(valid.float(), group).tolist() == [2, 2, 2, 2, 2]
    assert group_mean(values, group, valid).tolist() == [2, 2, 2, 5, 5]
    torch.testing.assert_close(group_std(values, group, valid), torch.tensor([2**0.5] * 3 + [0.0] * 2))
    alone = torch.tensor([0])
    assert group_std(torch.tensor([4.0]), alone, torch.tensor([True])).tolist() == [0.0]


def test_sequence_reductions_ignore_what_lies_off_the_mask(random_batch):
    batch = random_batch(5)
    values = torch.where(batch.mask, 2.0, float("nan"))
    assert torch.equal(seq_sum(values, batch.mask), 2.0 * batch.tokens_chosen)
    assert seq_mean(values, batch.mask).tolist() == [2.0] * len(batch)
    assert torch.equal(broadcast(torch.ones(len(batch)), batch.mask), batch.mask.float())


def test_a_blank_row_has_nothing_to_train_on(random_batch):
    row = blank_row(random_batch(6))
    assert len(row) == 1 and not row.mask.any() and row.reward.isnan().all()
    assert row.advantage.abs().sum() == row.loss_share.abs().sum() == 0


def test_shapes_are_checked_in_tests(random_batch):
    batch = random_batch(7)
    with pytest.raises(TypeCheckError):
        batch.set(reward=torch.zeros(len(batch) + 1))
    with pytest.raises(TypeCheckError):
        seq_sum(batch.advantage, batch.mask[:, 1:])


@pytest.mark.parametrize("values", [[0.0, 3.5, 1e-30, 3.4999998], [0.0], [], [1e30, 2.0], [1e-44, 0.0]])
def test_the_largest_number_of_all_ranks_is_found_to_the_bit(values, random_batch):
    first, second = random_batch(0), random_batch(1, groups=2)
    numbers = {len(first): torch.tensor(values), len(second): torch.tensor([7.25, 7.2499995])}
    assert first.largest(numbers[len(first)]) == max([0.0, *numbers[len(first)].tolist()])
    found = on_ranks([first, second], lambda batch: batch.largest(numbers[len(batch)]))
    assert found == [max([7.25, *numbers[len(first)].tolist()])] * 2
