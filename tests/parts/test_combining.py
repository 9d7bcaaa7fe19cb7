"""Combinations of rewards against plain loops, at their limits, and with memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close, examples, rough_batch, seeds

from posttrain.batch import Batch, RewardColumns
from posttrain.parts import advantages, combining, rewards
from posttrain.recipe.part import Part
from posttrain.training.apply_parts import add_rewards
from posttrain.training.recipe import load_recipe

GRPO = Path(__file__).parents[2] / "recipes" / "rl" / "grpo.yaml"


def with_rewards(batch: Batch, seed: int, weights: tuple[float, ...] = (1.0, 0.5, 2.0), missing: float = 0.2) -> Batch:
    """The batch with columns a, b, c of numbers in [0, 1], a share of which does not apply."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(batch), len(weights))
    table = torch.rand(shape, generator=g)
    table = table.where(torch.rand(shape, generator=g) >= missing, torch.nan)
    table[:, 0] = table[:, 0].nan_to_num(0.25)
    names = tuple("abc"[: len(weights)])
    return batch.set(rewards=table, reward_columns=RewardColumns(names, weights, verifiers=len(weights)))


def table_of(batch: Batch) -> list[list[float]]:
    assert batch.rewards is not None
    return batch.rewards.tolist()


@examples()
@given(seeds)
def test_normalised_sum_is_the_sum_of_group_z_scores(seed: int) -> None:
    batch = with_rewards(rough_batch(seed), seed)
    table, weights, trained = table_of(batch), batch.reward_columns.weights, batch.trained.tolist()
    expected = []
    for i, row in enumerate(table):
        total = 0.0
        for k, weight in enumerate(weights):
            mates = [j for j in range(len(table)) if batch.group[j] == batch.group[i] and trained[j]]
            known = [table[j][k] for j in mates if not math.isnan(table[j][k])]
            if not math.isnan(row[k]) and len(known) > 1 and stdev(known) > 0:
                total += weight * (row[k] - fmean(known)) / (stdev(known) + 1e-4)
        expected.append(total)
    close(combining.normalised_sum(batch), torch.tensor(expected))


@examples()
@given(seeds)
def test_normalised_sum_and_whitening_are_trls_normalize_then_sum(seed: int) -> None:
    """TRL 1.16's formula, for groups of equal size in order in which all rewards apply: no special case."""
    batch = with_rewards(rough_batch(seed, plain=True), seed, missing=0.0)
    assert batch.rewards is not None
    grouped = batch.rewards.double().view(3, 4, 3)
    z = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (z.view(12, 3) * torch.tensor(batch.reward_columns.weights).double()).sum(-1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    combined = batch.set(reward=combining.normalised_sum(batch), step_reward=torch.zeros_like(batch.step_reward))
    found = advantages.outcome(combined, center="batch", scale="batch")
    first = batch.mask.int().argmax(-1)
    close(found[torch.arange(12), first], expected.float())


def test_one_reward_standardised_is_what_grpo_does() -> None:
    batch = with_rewards(rough_batch(5), 5, weights=(1.0,), missing=0.0)
    assert batch.rewards is not None
    reward = batch.rewards[:, 0].where(batch.scored, torch.nan)
    batch = batch.set(reward=reward, score=reward, step_reward=torch.zeros_like(batch.step_reward))
    grpo = advantages.outcome(batch, center="group", scale="group")
    combined = batch.set(reward=combining.normalised_sum(batch).where(batch.scored, torch.nan))
    close(advantages.outcome(combined, center="none"), grpo)


@examples()
@given(seeds, st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, math.inf]))
def test_power_mean_against_loops(seed: int, p: float) -> None:
    batch = with_rewards(rough_batch(seed), seed)
    expected = []
    for row in table_of(batch):
        known = [(w, max(r, 1e-6)) for w, r in zip(batch.reward_columns.weights, row, strict=True) if not math.isnan(r)]
        whole = sum(w for w, _ in known)
        if math.isinf(p):
            expected.append((max if p > 0 else min)(r for _, r in known))
        elif p == 0:
            expected.append(math.prod(r ** (w / whole) for w, r in known))
        else:
            expected.append(sum(w / whole * r**p for w, r in known) ** (1 / p))
    close(combining.power_mean(batch, p=p), torch.tensor(expected))


def test_power_means_grow_with_the_exponent() -> None:
    batch = with_rewards(rough_batch(3), 3)
    means = [combining.power_mean(batch, p=p) for p in (-math.inf, -5.0, 0.0, 1.0, 5.0, math.inf)]
    assert all(bool((low <= high + 1e-6).all()) for low, high in zip(means, means[1:], strict=False))


def test_power_mean_needs_positive_weights() -> None:
    with pytest.raises(ValueError, match="positive weights"):
        combining.power_mean(with_rewards(rough_batch(0), 0, weights=(1.0, -0.5)), p=0.0)


def test_a_later_reward_counts_only_where_the_earlier_ones_reach_their_bounds() -> None:
    batch = rough_batch(1, plain=True)[[0, 1, 2, 3]]
    table = torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, 0.8], [float("nan"), 0.2]])
    batch = batch.set(rewards=table, reward_columns=RewardColumns(("form", "right"), (1.0, 1.0), verifiers=2))
    found = combining.first_failing(batch, at_least={"form": 1.0, "right": 0.8})
    close(found, torch.tensor([0.5, 0.25, 1.0, 0.625]))
    swapped = combining.first_failing(batch, at_least={"right": 0.8, "form": 1.0})
    close(swapped, torch.tensor([0.0, 0.75, 1.0, 0.125]))


def test_an_unknown_reward_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no reward 'd'; this recipe has a, b, c"):
        combining.first_failing(with_rewards(rough_batch(0), 0), at_least={"d": 1.0})


@examples()
@given(seeds)
def test_multipliers_follow_the_violation_and_weigh_the_slack(seed: int) -> None:
    part = combining.constrained(at_least={"b": 0.9}, at_most={"c": 0.1}, rate=0.5, start=0.3, largest=0.6)
    multipliers = {"b": 0.3, "c": 0.3}
    for step in range(3):
        batch = with_rewards(rough_batch(seed + step), seed + step)
        table, trained = table_of(batch), batch.trained.tolist()
        expected = []
        for a, b, c in table:
            slack_b = 0.0 if math.isnan(b) else b - 0.9
            slack_c = 0.0 if math.isnan(c) else 0.1 - c
            expected.append(a + multipliers["b"] * slack_b + multipliers["c"] * slack_c)
        close(part(batch), torch.tensor(expected))
        for k, (name, sign, bound) in enumerate([("b", 1, 0.9), ("c", -1, 0.1)], start=1):
            known = [
                sign * (row[k] - bound)
                for row, counts in zip(table, trained, strict=True)
                if counts and not math.isnan(row[k])
            ]
            mean = fmean(known) if known else 0.0
            multipliers[name] = min(max(0.0, multipliers[name] - 0.5 * mean), 0.6)
        assert part.state == pytest.approx(multipliers, abs=1e-6)
    assert part.metrics() == {f"combine/multiplier/{name}": part.state[name] for name in "bc"}


def test_multipliers_find_the_constrained_optimum() -> None:
    """Two answers: one right and long, one wrong and short. A mean length of 0.4 allows the long one 40 times in 100.

    The policy is a softmax that climbs the exact gradient of the combined reward. It and the multiplier swing around
    the optimum, so means are compared.
    """
    part = combining.constrained(at_most={"long": 0.4}, rate=0.05)
    batch = rough_batch(0, plain=True)[[0]]
    columns = RewardColumns(("right", "long"), (1.0, 1.0), verifiers=2)
    logit, shares, multipliers = 0.0, [], []
    for _ in range(2000):
        share = 1 / (1 + math.exp(-logit))
        shares.append(share)
        multipliers.append(part.state["long"])
        part(batch.set(rewards=torch.tensor([[share, share]]), reward_columns=columns))
        logit += 0.5 * share * (1 - share) * (1.0 - multipliers[-1])
    assert fmean(shares[500:]) == pytest.approx(0.4, abs=0.02)
    assert fmean(multipliers[500:]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("bounds", [{}, {"at_least": {"a": 0.1}, "at_most": {"a": 0.5}}])
def test_constrained_needs_one_bound_a_reward(bounds) -> None:
    with pytest.raises(ValueError, match="needs bounds, one a reward"):
        combining.constrained(**bounds)


def test_the_default_is_the_weighted_sum_to_the_bit() -> None:
    batch = rough_batch(4).set(rewards=None, reward_columns=RewardColumns())
    parts = (
        Part(call=rewards.length, name="length", weight=0.3),
        Part(call=lambda b: b.reward.new_full((len(b),), 0.1), name="length", weight=0.7),
    )
    found = add_rewards(replace(load_recipe(GRPO), reward=parts), batch)
    expected = batch.reward + 0.3 * rewards.length(batch) + 0.7 * torch.full_like(batch.reward, 0.1)
    assert torch.equal(found.reward.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert found.reward_columns == RewardColumns(("score", "length", "length_2"), (1.0, 0.3, 0.7), verifiers=1)
    assert found.rewards is not None and found.rewards.shape == (len(batch), 3)


def test_an_unscored_completion_stays_unscored_whatever_a_combination_returns() -> None:
    batch = rough_batch(2)
    ones = Part(call=lambda b: torch.ones(len(b)), name="ones")
    found = add_rewards(replace(load_recipe(GRPO), combine=ones), batch)
    assert found.reward.isnan().tolist() == batch.score.isnan().tolist()
    bad = Part(call=lambda b: torch.full((len(b),), torch.inf), name="bad")
    with pytest.raises(ValueError, match="part 'bad' returned"):
        add_rewards(replace(load_recipe(GRPO), combine=bad), batch)


def test_rewards_stay_beside_their_completions() -> None:
    batch = with_rewards(rough_batch(6), 6)
    again = Batch.concatenate([batch[[3, 1]].trim(), batch[[0]].trim()])
    assert batch.rewards is not None and again.rewards is not None
    assert torch.equal(again.rewards.nan_to_num(9.0), batch.rewards[[3, 1, 0]].nan_to_num(9.0))
    assert again.reward_columns == batch.reward_columns
    other = batch.set(reward_columns=RewardColumns(("x", "y", "z"), (1.0, 1.0, 1.0), verifiers=3))
    joined = Batch.concatenate([batch, other])
    assert (joined.rewards, joined.reward_columns) == (None, RewardColumns())
