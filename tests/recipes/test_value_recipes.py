"""Recipes that train guides: their parts, put together as the loop does it, against the paper's formula in loops.

That each takes real steps is in ``test_value_runs.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import reference_values
import torch
from hypothesis import given
from parts_cases import close, examples, seeds
from reference_value_recipes import VALUES, read
from test_rl_recipes import case, learns_probabilities, prepared, updated

from posttrain import load_recipe
from posttrain.batch import Outputs
from posttrain.parts import weighting
from posttrain.training.apply_parts import total_value_loss
from posttrain.training.setup import value_kind

FOLDER = Path(__file__).parents[2] / "recipes" / "value"
SOFT = {"contrastive_twist": 0.5, "sixo": 0.5, "soft": 0.5}
RECIPES = {name: load_recipe(FOLDER / f"{name}.yaml") for name in VALUES}


@pytest.mark.parametrize("name", VALUES)
@given(seed=seeds)
@examples(4)
def test_losses_and_gradients_equal_the_formula(name: str, seed: int) -> None:
    recipe = RECIPES[name]
    inputs = case(seed, labels=learns_probabilities(recipe))
    batch, rows = prepared(recipe, inputs.batch)
    found = updated(recipe, batch, rows, inputs.logp, inputs.value)
    lists = read(inputs.batch, torch.zeros_like(inputs.logp))
    loss, values, logp = VALUES[name](lists), inputs.value.tolist(), inputs.logp.tolist()
    assert found.value_loss == pytest.approx(loss(values, logp), rel=1e-5, abs=1e-6)
    if name != "contrastive_twist":  # whose weights depend on the values, without gradient: see test_value_losses.py
        states = [(i, c) for i in range(len(values)) for c in lists.rows.states(i)]
        expected = torch.tensor(reference.gradient(lambda v, _: loss(v, logp), values, states))
        close(found.by_value, expected, 1e-5)


@given(seed=seeds)
@examples(2)
def test_the_value_of_re_control_learns_one_step_targets_by_classification(seed: int) -> None:
    recipe = load_recipe(FOLDER / "re_control.yaml")
    inputs = case(seed, labels=True)
    batch, rows = prepared(recipe, inputs.batch)
    support = torch.linspace(-0.1, 1.1, 101)
    logits = torch.randn(*inputs.value.shape, 101, generator=torch.Generator().manual_seed(seed))
    outputs = Outputs(logp=inputs.logp[rows], value=inputs.value[rows], value_logits=logits[rows], support=support)
    found, _ = total_value_loss(recipe.value_loss, outputs, batch)
    lists = read(inputs.batch, torch.zeros_like(inputs.logp)).rows
    lists.target = reference_values.lambda_return(lists, lambda_=0.0)
    losses = [
        reference_values.cross_entropy(
            reference_values.hl_gauss_target(lists.target[i][c], support.tolist()), logits[i, c].tolist()
        )
        for i in range(len(lists.mask))
        if lists.trained(i)
        for c in lists.learned(i)
    ]
    assert float(found) == pytest.approx(sum(losses) / max(len(losses), 1), rel=1e-4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_kinds_of_values_are_those_of_their_losses(path: Path) -> None:
    kind = value_kind(load_recipe(path))
    assert kind == (("soft", SOFT[path.stem]) if path.stem in SOFT else ("mean", None))


@given(seed=seeds)
@examples(4)
def test_tilted_weights_have_mean_1_in_every_group(seed: int) -> None:
    batch = case(seed).batch
    weight = weighting.tilted(Outputs(logp=batch.logp_sampler), batch, beta=0.5)
    alive = batch.scored & ~batch.baseline_only
    assert weight.shape == batch.mask.shape and bool((weight[~alive] == 0).all())
    for group in batch.group[alive].unique():
        assert float(weight[(batch.group == group) & alive, 0].mean()) == pytest.approx(1.0, abs=1e-5)
