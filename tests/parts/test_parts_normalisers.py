"""Normalisers: against scalar loops, identities, invariance to the split of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import reference
import torch
from hypothesis import given
from parts_cases import close, examples, halves, on_ranks, pad, rough_batch, seeds
from torch import Tensor

from posttrain.batch import Batch
from posttrain.parts import normalisers

NORMALISERS: dict[str, Callable[[Batch], Tensor]] = {
    "token_mean": normalisers.token_mean,
    "seq_mean_of_token_mean": normalisers.seq_mean_of_token_mean,
    "seq_mean_of_token_sum": normalisers.seq_mean_of_token_sum,
    "seq_sum_over": partial(normalisers.seq_sum_over, length=16),
    "token_sum": normalisers.token_sum,
}
REFERENCES = {name: getattr(reference, name) for name in NORMALISERS} | {
    "seq_sum_over": partial(reference.seq_sum_over, length=16)
}
every_normaliser = pytest.mark.parametrize("name", NORMALISERS)


@every_normaliser
@given(seed=seeds)
@examples()
def test_weighted_sums_equal_the_scalar_loops(name: str, seed: int) -> None:
    batch = rough_batch(seed)
    weight = NORMALISERS[name](batch)
    assert weight.dtype == torch.float32 and bool((weight[~batch.mask] == 0).all())
    values = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed))
    term = values.tolist()
    close((values * weight).sum(), REFERENCES[name](reference.read(batch), lambda i, t: term[i][t]), 2e-6)


@every_normaliser
@given(seed=seeds)
@examples(10)
def test_padding_order_and_ranks_do_not_matter(name: str, seed: int) -> None:
    batch = rough_batch(seed)
    whole = NORMALISERS[name](batch)
    assert torch.equal(NORMALISERS[name](pad(batch, 3))[:, :-3], whole)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(NORMALISERS[name](batch[order]), whole[order])
    rows = halves(batch)
    for index, found in zip(rows, on_ranks([batch[i] for i in rows], NORMALISERS[name]), strict=True):
        assert torch.equal(found, whole[index])


@given(seed=seeds)
@examples(10)
def test_on_equal_lengths_they_agree_up_to_a_constant(seed: int) -> None:
    batch = rough_batch(seed, plain=True)
    batch = batch.set(mask=(torch.arange(10) >= 4).expand(len(batch), 10))
    mean = normalisers.token_mean(batch)
    close(normalisers.seq_mean_of_token_mean(batch), mean)
    close(normalisers.seq_mean_of_token_sum(batch) / 6, mean)
    close(normalisers.seq_sum_over(batch, length=6), mean)
    close(normalisers.token_sum(batch) / (6 * len(batch)), mean)


def test_rows_without_a_chosen_token_and_baselines_are_not_counted() -> None:
    batch = rough_batch(0, groups=1, size=4, plain=True)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 3:9] = mask[3, 3:5] = True
    batch = batch.set(mask=mask, baseline_only=torch.tensor([False, False, False, True]))
    close(normalisers.seq_mean_of_token_mean(batch).sum(-1), [0.5, 0.5, 0, 0])
    close(normalisers.token_mean(batch).sum(-1), [2 / 8, 6 / 8, 0, 0])


@every_normaliser
def test_an_empty_batch_has_no_weight(name: str) -> None:
    batch = rough_batch(0)
    assert not NORMALISERS[name](batch.set(mask=torch.zeros_like(batch.mask))).any()


def test_a_length_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        normalisers.seq_sum_over(rough_batch(0), length=0)
