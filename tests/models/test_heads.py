"""Heads of value models against scalar loops."""

from __future__ import annotations

import pytest
import reference_value_models as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.heads import Head, bin_centres, output_count
from posttrain.recipe.sections import HeadSection as HeadOptions

TYPES = ("scalar", "categorical", "quantile", "bernoulli")


def make(kind: str, members: int = 1, bins: int = 7) -> Head:
    return Head(HeadOptions(type=kind, bins=bins, low=-0.3, high=1.4), 8, 11, members)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(TYPES), seed=st.integers(0, 10**6), members=st.integers(1, 3), bins=st.integers(2, 9))
def test_decoding_is_the_scalar_formula(kind, seed, members, bins):
    head = make(kind, members, bins)
    outputs = 3 * torch.randn(5, members, head.outputs, generator=torch.Generator().manual_seed(seed))
    values = head.decode(outputs)
    expected = [[reference.decode(kind, member.tolist(), -0.3, 1.4) for member in state] for state in outputs]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_number_of_outputs_depends_on_the_head():
    assert [output_count(HeadOptions(type=kind, bins=7), 11) for kind in (*TYPES, "per_token")] == [1, 7, 7, 1, 11]


def test_bins_are_equally_spaced_and_include_both_ends():
    centres = bin_centres(HeadOptions(type="categorical", bins=5, low=-1.0, high=3.0))
    assert centres.tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "start"), [("scalar", 0.0), ("categorical", 0.55), ("quantile", 0.0), ("bernoulli", 0.5)]
)
def test_a_head_of_one_member_starts_at_the_middle(kind, start):
    head = make(kind)
    values = head.decode(head(torch.randn(4, 8)))
    torch.testing.assert_close(values, torch.full((4, 1), start), atol=1e-6, rtol=0)


def test_members_start_different_and_equal_in_every_process():
    torch.manual_seed(1)
    first = make("scalar", members=4)
    torch.manual_seed(2)
    second = make("scalar", members=4)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert torch.cdist(first.linear.weight, first.linear.weight)[~torch.eye(4, dtype=torch.bool)].min() > 0.1
    large = Head(HeadOptions(), 4095, 1, members=2)
    assert large.linear.weight.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_members_do_not_mix():
    head, hidden = make("categorical", members=3), torch.randn(4, 8)
    before = head(hidden)
    with torch.no_grad():
        head.linear.weight[7:14] += 1.0  # the second member's rows
    assert (before == head(hidden)).all(-1).all(0).tolist() == [True, False, True]


def test_the_head_computes_in_float32_under_autocast():
    head, hidden = make("scalar", members=2), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(hidden)
    assert outputs.dtype == torch.float32 and torch.equal(outputs, head(hidden))


@pytest.mark.parametrize("members", [1, 2])
def test_outputs_of_one_token_equal_those_of_the_whole_per_token_head(members):
    head, hidden, token = make("per_token", members), torch.randn(6, 8), torch.randint(0, 11, (6,))
    torch.nn.init.normal_(head.linear.weight)
    all_tokens = head(hidden)
    assert all_tokens.shape == (6, members, 11)
    torch.testing.assert_close(head.of_tokens(hidden, token), all_tokens[torch.arange(6), :, token])


def test_a_per_token_head_has_no_single_value():
    with pytest.raises(ValueError, match="each next token"):
        make("per_token").decode(torch.zeros(2, 1, 11))
