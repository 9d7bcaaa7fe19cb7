"""Micro-batches stay within their budget of tokens, and every rank has as many of them."""

from __future__ import annotations

import pytest
import torch

from posttrain.micro_batches import length_groups, micro_batches


def test_micro_batches_stay_within_the_budget_and_lose_nothing(random_batch):
    batch = random_batch(0, groups=5, size=6, columns=30)
    parts = micro_batches(batch, 64, lambda count: count)
    assert sorted(text for part in parts for text in part.texts) == sorted(batch.texts)
    assert all(part.tokens.numel() <= 64 or len(part) == 1 for part in parts)
    assert all(part.tokens.shape[1] == int(part.length.max()) for part in parts)
    assert len(parts) < len(batch)


def test_a_row_longer_than_the_budget_stands_alone():
    assert length_groups(torch.tensor([100, 3, 4]), 10) == [[1, 2], [0]]


@pytest.mark.parametrize("wanted", [7, 12, 20])
def test_every_rank_brings_as_many_micro_batches(random_batch, wanted):
    batch = random_batch(1)
    parts = micro_batches(batch, 60, lambda count: max(count, wanted))
    assert len(parts) == wanted
    texts = sorted(text for part in parts for text in part.texts if part.mask.any())
    assert texts == sorted(batch.texts)
    assert sum(float(part.loss_share.sum()) for part in parts) == pytest.approx(float(batch.loss_share.sum()))
