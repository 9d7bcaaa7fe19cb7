"""Advantages and shapers: against scalar loops, golden numbers, identities, invariances, exact worlds."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, halves, on_ranks, pad, rough_batch, seeds, with_greedy
from random_batch import make_random_batch

from posttrain.batch import Batch
from posttrain.micro_batches import blank_row
from posttrain.parts.advantages import outcome, returns, whiten

CENTERS = ["none", "group", "leave_one_out", "greedy", "length", "batch"]
SCALES = ["none", "group", "batch"]
gammas = st.sampled_from([1.0, 0.9, 0.0])


def one_token_batch(rewards: list[float], group: list[int] | None = None) -> Batch:
    """Completions of one token each, which differ only in their rewards."""
    n = len(rewards)
    batch = make_random_batch(0, groups=1, size=n, columns=4, prompt=3)
    return batch.set(
        mask=torch.tensor([[False, False, False, True]]).repeat(n, 1),
        group=torch.tensor(group or [0] * n),
        score=torch.tensor(rewards),
        reward=torch.tensor(rewards),
        step_reward=torch.zeros(n, 4),
    )


def per_completion(batch: Batch, **options) -> list[float]:
    return outcome(batch, **options)[:, 3].tolist()


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("scale", SCALES)
@given(seed=seeds, ddof=st.integers(0, 1))
@examples(20)
def test_outcome_equals_the_scalar_loops(center: str, scale: str, seed: int, ddof: int) -> None:
    batch = with_greedy(rough_batch(seed))
    expected = reference.outcome(reference.read(batch), center, scale, ddof=ddof, eps=1e-4)
    found = outcome(batch, center=center, scale=scale, ddof=ddof, eps=1e-4)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    close(found, expected)


@pytest.mark.parametrize("center", CENTERS)
@given(seed=seeds, gamma=gammas)
@examples(20)
def test_returns_equal_the_scalar_loops(center: str, seed: int, gamma: float) -> None:
    batch = with_greedy(rough_batch(seed))
    expected = reference.returns(reference.read(batch), gamma, center)
    close(returns(batch, gamma=gamma, center=center), expected)  # type: ignore[arg-type]


@given(seed=seeds, shift=st.booleans(), ddof=st.integers(0, 1))
@examples()
def test_whiten_equals_the_scalar_loops(seed: int, shift: bool, ddof: int) -> None:
    batch = rough_batch(seed)
    assert batch.advantage is not None
    expected = reference.whiten(reference.read(batch), batch.advantage.tolist(), shift, ddof)
    close(whiten(batch.advantage, batch, shift=shift, ddof=ddof), expected)


def test_golden_numbers() -> None:
    """R = [1, 0, 0, 1]: mean 1/2, unbiased std sqrt(4 · (1/2)² / 3) = 0.57735; the others' mean 1/3 or 2/3."""
    batch = one_token_batch([1.0, 0.0, 0.0, 1.0])
    assert per_completion(batch, center="none") == [1, 0, 0, 1]
    assert per_completion(batch, center="group") == [0.5, -0.5, -0.5, 0.5]
    third = pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert per_completion(batch, center="leave_one_out") == third
    z = 0.5 / (1 / math.sqrt(3) + 1e-4)
    assert per_completion(batch, scale="group") == pytest.approx([z, -z, -z, z])
    assert per_completion(batch, scale="group", ddof=0, eps=0.0) == pytest.approx([1, -1, -1, 1])


def test_the_length_weighted_baseline_weighs_by_tokens() -> None:
    """Two completions of 3 and 1 tokens with rewards 1 and 0: b = 3/4."""
    batch = make_random_batch(0, groups=1, size=2, columns=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    batch = batch.set(mask=mask, reward=torch.tensor([1.0, 0.0]), step_reward=torch.zeros(2, 6))
    close(outcome(batch, center="length")[:, 2], [0.25, -0.75])


@given(seed=seeds)
@examples()
def test_leave_one_out_is_the_group_mean_times_g_over_g_minus_1(seed: int) -> None:
    batch = rough_batch(seed, plain=True)
    close(outcome(batch, center="leave_one_out"), outcome(batch, center="group").double() * 4 / 3)


@given(seed=seeds)
@examples()
def test_equal_lengths_make_the_length_weighted_baseline_the_group_mean(seed: int) -> None:
    batch = rough_batch(seed, plain=True)
    batch = batch.set(mask=(torch.arange(10) > 2).expand(len(batch), 10))
    close(outcome(batch, center="length"), outcome(batch, center="group"))


@pytest.mark.parametrize("center", ["group", "leave_one_out", "length", "batch"])
@given(seed=seeds, shift=st.floats(-5, 5))
@examples(20)
def test_a_constant_added_to_every_reward_changes_nothing(center: str, seed: int, shift: float) -> None:
    batch = rough_batch(seed)
    moved = batch.set(reward=batch.reward + shift)
    close(outcome(moved, center=center, scale="group"), outcome(batch, center=center, scale="group"), 1e-4)  # type: ignore[arg-type]


@given(seed=seeds, factor=st.floats(0.1, 10))
@examples()
def test_z_scores_do_not_depend_on_the_scale_of_rewards(seed: int, factor: float) -> None:
    batch = rough_batch(seed)
    scaled = batch.set(reward=batch.reward * factor, step_reward=batch.step_reward * factor)
    close(outcome(scaled, scale="group", eps=0.0), outcome(batch, scale="group", eps=0.0), 1e-4)


@pytest.mark.parametrize("center", ["group", "leave_one_out", "length", "batch"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rewards", [[0.1] * 5, [1.0], [math.nan] * 3, [math.nan, 0.3]])
def test_where_nothing_differs_the_advantage_is_exactly_zero(center, scale, rewards) -> None:
    assert per_completion(one_token_batch(rewards), center=center, scale=scale) == [0.0] * len(rewards)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_rewards_without_spread_are_not_divided(scale) -> None:
    assert per_completion(one_token_batch([2.0, 2.0]), center="none", scale=scale) == [2.0, 2.0]


def test_the_greedy_completion_is_the_baseline_and_not_trained() -> None:
    batch = one_token_batch([1.0, 0.0, 0.25, 1.0, 0.0], group=[4, 4, 4, 2, 2])
    batch = batch.set(baseline_only=torch.tensor([False, False, True, False, True]))
    assert per_completion(batch, center="greedy") == [0.75, -0.25, 0, 1, 0]
    unscored = batch.set(reward=torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0]))
    assert per_completion(unscored, center="greedy") == [0, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="made no greedy completions"):
        outcome(one_token_batch([1.0, 0.0]), center="greedy")
    blank = blank_row(batch)  # of a rank whose prompts were all dropped, their greedy completions with them
    assert outcome(blank, center="greedy").abs().sum() == 0


@pytest.mark.parametrize("option", [{"center": "median"}, {"scale": "iqr"}])
def test_an_unknown_option_is_refused(option) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        outcome(one_token_batch([1.0, 0.0]), **option)


def test_returns_step_over_tokens_that_the_policy_did_not_choose() -> None:
    """r = [1, (5), 2], reward 4, γ = 1/2: the last chosen token has 2 + 4, the first 1 + 6/2; the 5 is not counted."""
    batch = make_random_batch(0, groups=1, size=1, columns=3, prompt=0)
    batch = batch.set(
        mask=torch.tensor([[True, False, True]]),
        reward=torch.tensor([4.0]),
        step_reward=torch.tensor([[1.0, 5.0, 2.0]]),
    )
    assert returns(batch, gamma=0.5).tolist() == [[4.0, 0.0, 6.0]]
    assert returns(batch).tolist() == [[7.0, 0.0, 6.0]]


@given(seed=seeds)
@examples()
def test_undiscounted_returns_without_step_rewards_are_the_outcome(seed: int) -> None:
    batch = rough_batch(seed)
    batch = batch.set(step_reward=torch.zeros_like(batch.step_reward))
    close(returns(batch, center="leave_one_out"), outcome(batch, center="leave_one_out"))


@given(seed=seeds)
@examples()
def test_whitened_advantages_have_mean_0_and_variance_1(seed: int) -> None:
    batch = rough_batch(seed, plain=True)
    assert batch.advantage is not None
    values = whiten(3 * batch.advantage + 5, batch)[batch.mask].double()
    assert values.mean().item() == pytest.approx(0, abs=1e-5)
    assert values.var(correction=0).item() == pytest.approx(1, abs=1e-5)


ADVANTAGES = {f"{center}-{scale}": {"center": center, "scale": scale} for center in CENTERS for scale in SCALES}


def credit_of(batch: Batch, options: dict) -> torch.Tensor:
    return whiten(outcome(batch, **options) + returns(batch, gamma=0.9, center=options["center"]), batch)


@pytest.mark.parametrize("options", ADVANTAGES.values(), ids=ADVANTAGES)
@given(seed=seeds)
@examples(8)
def test_invariance_to_padding_row_order_and_ranks(options: dict, seed: int) -> None:
    batch = with_greedy(rough_batch(seed))
    whole = credit_of(batch, options)
    close(credit_of(pad(batch, 3, torch.nan), options)[:, :-3], whole)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    close(credit_of(batch[order], options), whole[order])
    rows = halves(batch)
    if options["center"] == "greedy" and not all(batch.baseline_only[index].any() for index in rows):
        return
    for index, found in zip(rows, on_ranks([batch[i] for i in rows], lambda b: credit_of(b, options)), strict=True):
        close(found, whole[index])


def bandit_ratios(advantage_options: dict, rewards: list[float], theta: list[float], size: int) -> list[float]:
    """E over all groups of mean_i A_i ∇log π(y_i), divided component by component by the true ∇E[R]."""
    p = [math.exp(x) / sum(map(math.exp, theta)) for x in theta]
    mean = sum(a * b for a, b in zip(p, rewards, strict=True))
    exact = [p[k] * (rewards[k] - mean) for k in range(len(p))]
    expected = [0.0] * len(p)
    for group in itertools.product(range(len(p)), repeat=size):
        chance = math.prod(p[y] for y in group)
        advantage = per_completion(one_token_batch([rewards[y] for y in group]), **advantage_options)
        for y, a in zip(group, advantage, strict=True):
            for k in range(len(p)):
                expected[k] += chance * a * ((y == k) - p[k]) / size
    return [a / b for a, b in zip(expected, exact, strict=True)]


@pytest.mark.parametrize("size", [2, 3])
def test_bias_of_each_baseline_on_an_enumerated_bandit(size: int) -> None:
    """Leave-one-out is unbiased, the group mean shrinks the gradient by (G-1)/G, z-scores bend it."""
    rewards, theta = [1.0, 0.2, 0.0], [0.3, -0.2, 0.1]
    assert bandit_ratios({"center": "leave_one_out"}, rewards, theta, size) == pytest.approx([1.0] * 3, abs=1e-5)
    shrunk = (size - 1) / size
    assert bandit_ratios({"center": "group"}, rewards, theta, size) == pytest.approx([shrunk] * 3, abs=1e-5)
    assert bandit_ratios({"center": "none"}, rewards, theta, size) == pytest.approx([1.0] * 3, abs=1e-5)


def test_golden_bias_of_z_scores() -> None:
    """The numbers of the enumeration with the unbiased std and no eps, at θ = [.3, -.2, .1], r = [1, .2, 0], K = 2."""
    found = bandit_ratios({"scale": "group", "ddof": 1, "eps": 0.0}, [1.0, 0.2, 0.0], [0.3, -0.2, 0.1], 2)
    assert found == pytest.approx([0.7729, 0.2015, 1.0131], abs=1e-4)
