"""Preference terms as parts of a recipe, on a real (tiny) language model, full and with adapters."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from random_batch import make_random_batch

from posttrain.batch import Batch, Outputs
from posttrain.models.policy import Policy, build_policy
from posttrain.parts.normalisers import group_mean_of_token_sum
from posttrain.parts.preference import list_targets, pair_links, pair_targets, point_links, scores
from posttrain.parts.preference.regularisers import nll
from posttrain.parts.preference.terms import listwise, pairwise, pointwise
from posttrain.recipe.part import Part
from posttrain.recipe.resolve import inner_slots, positional
from posttrain.recipe.sections import LoraSection
from posttrain.recipe.sections import PolicySection as PolicyOptions
from posttrain.training.apply_parts import total_loss

RECIPES = {
    "DPO": [Part.of(pairwise, beta=0.1)],
    "IPO": [
        Part.of(
            pairwise,
            beta=1.0,
            score=Part.of(scores.log_ratio, level="mean"),
            link=Part.of(pair_links.square, tau=0.1),
            target=Part.of(pair_targets.hard),
        )
    ],
    "KTO": [Part.of(pointwise, beta=0.1, link=Part.of(point_links.sigmoid))],
    "InfoNCA": [Part.of(listwise, target=Part.of(list_targets.best))],
    "ORPO": [
        Part.of(pairwise, beta=1.0, score=Part.of(scores.log_odds), settings={"coef": 0.1}),
        Part.of(nll, level="mean"),
    ],
}


def pairs() -> Batch:
    batch = make_random_batch(0, groups=4, size=2)
    batch = batch.set(reward=(torch.arange(8) % 2).float(), advantage=None, value=None)
    return batch.set(loss_share=group_mean_of_token_sum(batch))


def forward(policy: Policy, batch: Batch, *, reference: bool = False) -> Outputs:
    return Outputs(logp=policy(batch.tokens, batch.mask, reference=reference)[0])


@pytest.mark.parametrize(("name", "lora"), [*((name, None) for name in RECIPES), ("DPO", LoraSection(rank=4))])
def test_a_few_steps_prefer_the_chosen_completions(name: str, lora: LoraSection | None, tiny_model_folder) -> None:
    """Scores start at exactly 0, at the reference; micro-batches of whole groups give the same gradient."""
    batch, policy = pairs(), build_policy(PolicyOptions(model=str(tiny_model_folder), lora=lora)).train()
    with torch.no_grad():
        batch = batch.set(logp_ref=forward(policy, batch, reference=policy.has_adapters).logp)
        start = forward(policy, batch)
        assert not scores.log_ratio(start, batch).any()
        if name == "DPO":
            assert total_loss(RECIPES[name], start, batch)[0].item() == pytest.approx(math.log(2))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(8):
        for micro in (batch[batch.group < 2], batch[batch.group >= 2]):
            total_loss(RECIPES[name], forward(policy, micro), micro)[0].backward()
        if step == 0:
            split = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
            optimizer.zero_grad()
            total_loss(RECIPES[name], forward(policy, batch), batch)[0].backward()
            whole = [parameter.grad for parameter in trained if parameter.grad is not None]
            torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ratio = scores.log_ratio(forward(policy, batch), batch)
    chosen = batch.reward > 0
    assert (ratio[chosen] > ratio[~chosen]).all()


def test_options_that_are_parts_name_where_they_are_looked_up_and_what_they_take() -> None:
    several = []
    for term in (pairwise, pointwise, listwise):
        for name, mark in inner_slots(term).items():
            module = importlib.import_module(mark.module)
            functions = [value for value in vars(module).values() if getattr(value, "__module__", "") == mark.module]
            public = [f for f in functions if callable(f) and not f.__name__.startswith("_")]
            assert len(public) > 1
            for function in public:
                assert tuple(positional(function)) == mark.takes, function
            default = term.__kwdefaults__[name]
            assert default == () if mark.several else default in public
            several += [name] if mark.several else []
    assert several == ["margin", "pair_weight"]
