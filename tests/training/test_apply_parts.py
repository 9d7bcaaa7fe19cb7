"""Parts applied to a batch: sums of rewards, chains of shapers, weighted loss terms, and errors for wrong results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts_cases import close, moved_outputs, rough_batch

from posttrain.batch import Batch
from posttrain.parts import losses, normalisers, rewards, weighting
from posttrain.recipe.part import Part
from posttrain.training.apply_parts import add_rewards, advantages_of, total_loss
from posttrain.training.recipe import Recipe, load_recipe

GRPO = Path(__file__).parents[2] / "recipes" / "rl" / "grpo.yaml"


def recipe(**slots) -> Recipe:
    return replace(load_recipe(GRPO), **slots)


def part(call, name: str = "mine", **numbers) -> Part:
    return Part(call=call, name=name, **numbers)


@pytest.fixture
def batch() -> Batch:
    return rough_batch(1)


def test_rewards_of_completions_and_of_tokens_are_added_with_their_weights(batch: Batch) -> None:
    parts = (
        part(lambda b: b.reward.new_full((len(b),), 2.0), weight=0.5),
        part(rewards.kl_penalty, weight=0.1),
        part(lambda b: torch.full_like(b.step_reward, 3.0), weight=2.0),
    )
    found = add_rewards(recipe(reward=parts), batch)
    torch.testing.assert_close(found.reward, batch.reward + 1, equal_nan=True)
    expected = batch.step_reward + 0.1 * rewards.kl_penalty(batch) + 6
    close(found.step_reward[batch.mask], expected[batch.mask])
    assert found.reward.isnan().tolist() == batch.reward.isnan().tolist()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["completion", "token"])
def test_a_reward_that_is_not_finite_is_refused_where_it_counts(batch: Batch, number: float, of: str) -> None:
    scored, unscored = int(batch.scored.nonzero()[0]), int((~batch.scored).nonzero()[0])
    row, column = scored, int(batch.mask[scored].nonzero()[0])

    def spoilt(row: int, column: int):
        values = torch.zeros_like(batch.reward if of == "completion" else batch.step_reward)
        values[row if of == "completion" else (row, column)] = number
        return recipe(reward=(part(lambda b: values, name="spoilt"),))

    with pytest.raises(ValueError, match=rf"reward part 'spoilt' gave .* not finite to completions \[{row}\]"):
        add_rewards(spoilt(row, column), batch)
    off = int((~batch.mask[row]).nonzero()[0])
    add_rewards(spoilt(unscored, off) if of == "completion" else spoilt(row, off), batch)


def test_every_reward_sees_the_batch_as_it_was(batch: Batch) -> None:
    doubled = part(lambda b: b.reward)
    found = add_rewards(recipe(reward=(doubled, doubled)), batch)
    torch.testing.assert_close(found.reward, 3 * batch.reward, equal_nan=True)


def test_shapers_act_in_order_on_what_is_trained(batch: Batch) -> None:
    ones = part(lambda b: torch.ones_like(b.mask, dtype=torch.float64))
    shape = (part(lambda a, b: a + 1), part(lambda a, b: a * 10))
    found = advantages_of(recipe(advantage=ones, shape=shape), batch)
    trained = batch.mask & (batch.scored & ~batch.baseline_only)[:, None]
    assert found.dtype == torch.float32
    assert torch.equal(found, 20.0 * trained)


def test_terms_add_up_with_coefficients_and_weights(batch: Batch) -> None:
    outputs = moved_outputs(batch, 0)
    batch = batch.set(loss_share=normalisers.token_mean(batch))
    importance = (part(weighting.truncated_importance), part(weighting.masked_sequence))
    parts = [part(losses.clip, "clip", weights=importance), part(losses.kl, "kl", coef=0.5), part(losses.kl, "kl")]
    loss, terms = total_loss(parts, outputs, batch)
    weight = batch.loss_share
    factor = importance[0](outputs, batch) * importance[1](outputs, batch)
    clip, kl = losses.clip(outputs, batch), losses.kl(outputs, batch)
    close(terms["clip"], (clip * factor * weight).sum())
    close(terms["kl"], (kl * weight).sum())
    assert list(terms) == ["clip", "kl", "kl_2"] and not any(term.requires_grad for term in terms.values())
    close(loss, terms["clip"] + 0.5 * terms["kl"] + terms["kl_2"])


def test_weights_carry_no_gradient_even_if_they_could(batch: Batch) -> None:
    outputs = moved_outputs(batch, 0)
    batch = batch.set(loss_share=normalisers.token_mean(batch))
    ratio = part(lambda o, b: o.logp.where(b.mask, 0.0).exp())
    loss, _ = total_loss([part(losses.reinforce, weights=(ratio,))], outputs, batch)
    loss.backward()
    expected = (-batch.advantage * outputs.logp.detach().exp() * batch.loss_share).where(batch.mask, 0.0)  # type: ignore[operator]
    assert outputs.logp.grad is not None
    close(outputs.logp.grad, expected)


def test_a_part_that_returns_the_wrong_thing_is_named(batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"reward part 'mine' returned shape \[3\], expected \[12\]"):
        add_rewards(recipe(reward=(part(lambda b: torch.zeros(3)),)), batch)
    with pytest.raises(ValueError, match=r"part 'mine' returned shape \[12\], expected \[12, 10\]"):
        advantages_of(recipe(advantage=part(lambda b: b.reward)), batch)
    with pytest.raises(ValueError, match="part 'mine' gave an advantage that is not finite in completions"):
        advantages_of(recipe(advantage=part(lambda b: torch.full(b.mask.shape, torch.inf))), batch)
    with pytest.raises(ValueError, match=r"batch\.loss_share has not been filled"):
        total_loss([part(losses.reinforce)], moved_outputs(batch, 0), batch.set(loss_share=None))
