"""The probe finds which fields parts read, and refuses parts that fail or return the wrong shape."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from posttrain.errors import RecipeError
from posttrain.parts import advantages, losses, normalisers, rewards
from posttrain.recipe.part import Part
from posttrain.recipe.sections import DataSection, PolicySection
from posttrain.training.recipe import Recipe
from posttrain.training.required_passes import find_required_passes


def part(function, **options) -> Part:
    return Part(call=partial(function, **options), name=function.__name__, options=options)


def recipe(**changes) -> Recipe:
    slots = {
        "policy": PolicySection(model="none"),
        "data": DataSection(path="none"),
        "verify": (Part(call=lambda completion: 1.0, name="always"),),
        "advantage": part(advantages.outcome),
        "loss": (part(losses.clip),),
        "normaliser": part(normalisers.token_mean),
        "rollout": part(lambda: None),
        "prompts": part(lambda: None),
    }
    return Recipe(**{**slots, **changes})


def test_plain_grpo_needs_no_pass_before_the_update():
    needs = find_required_passes(recipe())
    assert not needs.scoring_pass and not needs.logp_ref and not needs.entropy_gradient


def test_several_updates_need_the_old_log_probs():
    assert find_required_passes(recipe(minibatches=2)).logp_old and find_required_passes(recipe(epochs=2)).logp_old


def test_a_kl_term_needs_the_reference_and_a_kl_reward_the_old_too():
    needs = find_required_passes(recipe(loss=(part(losses.clip), part(losses.kl))))
    assert needs.logp_ref and not needs.logp_old
    needs = find_required_passes(recipe(reward=(part(rewards.kl_penalty),)))
    assert needs.logp_ref and needs.logp_old


def test_an_entropy_term_needs_its_gradient():
    assert find_required_passes(recipe(loss=(part(losses.entropy),))).entropy_gradient


def test_reading_in_a_helper_after_a_copy_is_still_seen():
    def hidden(batch):
        return (batch[batch.mask.any(-1)].set(step=3)).entropy * batch.mask

    assert find_required_passes(recipe(advantage=part(hidden))).entropy


def test_parts_with_memory_forget_the_probe():
    class Counter:
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            return batch.mask.float()

    counter = Counter()
    find_required_passes(recipe(advantage=Part(call=counter, name="counter")))
    assert counter.calls == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda batch: batch.reward, r"returned \[8\] for a batch of \[8, 6\]; expected \[N, L\]"),
        (lambda batch: 3.0, "returned float"),
        (lambda batch: batch.rewardz, "AttributeError"),
    ],
)
def test_a_part_that_does_not_fit_is_named(function, message):
    with pytest.raises(RecipeError, match=message):
        find_required_passes(recipe(advantage=Part(call=function, name="mine")))


def test_a_loss_keeps_its_gradient_in_the_probe():
    seen = {}

    def loss(outputs, batch):
        seen["requires_grad"] = outputs.logp.requires_grad
        return torch.exp(outputs.logp)

    find_required_passes(recipe(loss=(part(loss),)))
    assert seen["requires_grad"]
