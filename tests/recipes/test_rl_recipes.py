"""Every recipe of ``recipes/rl``: its parts, put together as the loop does it, against the paper's formula in loops.

Each also keeps its losses and gradients whatever the padding, the order of rows, the micro-batches and the ranks.
Rewards that a saved process model gives come from a fixed table here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given
from parts_cases import close, examples, halves, moved_outputs, on_ranks, pad, rough_batch, seeds, with_greedy
from reference_value_recipes import RECIPES, Case, Losses, read, vapo, without_values
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.parts.credit import step_ends, weigh_worst
from posttrain.recipe.part import Part
from posttrain.training.apply_parts import add_rewards, advantages_of, total_loss, total_value_loss, value_target
from posttrain.training.learner import with_shares
from posttrain.training.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "rl"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
every_recipe = pytest.mark.parametrize("name", NAMES)

JUDGEMENTS = 2 * torch.rand(256, generator=torch.Generator().manual_seed(7)) - 1


def judged(batch: Batch) -> Tensor:
    """Reward in place of a process model: a number for each step, by the token that it ends with."""
    return JUDGEMENTS[batch.tokens].where(step_ends(batch), 0.0)


@cache
def load(name: str) -> Recipe:
    return with_judge(load_recipe(FOLDER / f"{name}.yaml"), judged)


def with_judge(recipe: Recipe, judge: Callable[[Batch], Tensor]) -> Recipe:
    """The recipe with another judge where a saved model is one; its weight and its temperature stay."""

    def judged_by(part: Part) -> Part:
        temperature = part.options.get("temperature")
        if part.name != "reward_models.process":
            return part
        if temperature is None:
            return dataclasses.replace(part, call=judge)
        weighed = partial(_weighed, judge=judge, temperature=temperature)
        return dataclasses.replace(part, call=weighed)

    return dataclasses.replace(recipe, reward=tuple(map(judged_by, recipe.reward)))


def _weighed(batch: Batch, judge: Callable[[Batch], Tensor], temperature: float) -> Tensor:
    return weigh_worst(judge(batch), step_ends(batch), temperature)


class Inputs(NamedTuple):
    """A batch, and the log-probs and values of it that the models put out in the update."""

    batch: Batch
    logp: Tensor
    value: Tensor

    def rows(self, index: Tensor) -> Inputs:
        return Inputs(self.batch[index], self.logp[index], self.value[index])


class Step(NamedTuple):
    """The losses of one optimiser step, and the gradient of their sum."""

    loss: float
    value_loss: float
    by_logp: Tensor
    by_value: Tensor


def learns_probabilities(recipe: Recipe) -> bool:
    return any(part.name == "bce" for part in recipe.value_loss)


def case(seed: int, *, labels: bool = False) -> Inputs:
    """A batch that needs every recipe's care, and log-probs and values that have moved.

    Each rank's half has a greedy completion. Values are NaN off the states. Like the log-ratios, the changes of values
    lie on a grid that misses the bounds of the clips.

    Args:
        labels: rewards are probabilities.
    """
    batch = rough_batch(seed, size=5)
    for rows in halves(batch):
        batch = batch.set(baseline_only=batch.baseline_only.index_fill(0, rows[:1], True))
    g = torch.Generator().manual_seed(seed + 3)
    value = torch.randn(batch.mask.shape, generator=g).where(batch.states, torch.nan)
    change = (0.2 * torch.randn(batch.mask.shape, generator=g) / 0.001).round() * 0.001 + 0.0005
    batch = batch.set(
        value=value,
        step_id=torch.where(batch.mask, torch.arange(batch.mask.shape[1]) // 3, -1),
        reward=batch.score if labels else batch.reward,
    )
    return Inputs(batch, moved_outputs(batch, seed, scale=0.5).logp.detach(), value + change)


def case_of(name: str, seed: int) -> Inputs:
    return case(seed, labels=learns_probabilities(load(name)))


def taken(recipe: Recipe, inputs: Inputs, micro: int | None = None) -> Step:
    """One optimiser step in micro-batches of ``micro`` rows."""
    batch, rows = prepared(recipe, inputs.batch)
    return updated(recipe, batch, rows, inputs.logp, inputs.value, micro)


def prepared(recipe: Recipe, batch: Batch) -> tuple[Batch, Tensor]:
    """The batch as the update sees it, and the numbers of its rows."""
    rows = torch.arange(len(batch))
    for part in recipe.select:
        kept = part(batch)
        batch, rows = batch[kept], rows[kept]
    batch = judged_and_credited(recipe, batch)
    trained = ~batch.baseline_only
    for part in recipe.keep:
        trained &= part(batch)
    return with_shares(recipe, batch[trained]), rows[trained]


def updated(recipe: Recipe, batch: Batch, rows: Tensor, logp: Tensor, value: Tensor, micro: int | None = None) -> Step:
    """Losses of a prepared batch, and gradients of both kinds of outputs for all rows there were."""
    leaves = logp.clone().requires_grad_(), value.clone().requires_grad_()
    sums = [0.0, 0.0]
    for index in torch.arange(len(batch)).split(micro or max(len(batch), 1)):
        now = [leaf[rows[index]] for leaf in leaves]
        outputs = Outputs(logp=now[0], value=now[1], value_logits=now[1][..., None])
        losses = losses_of(recipe, outputs, batch[index])
        torch.stack(losses).sum().backward()
        sums = [total + loss.item() for total, loss in zip(sums, losses, strict=True)]
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return Step(sums[0], sums[1], gradients[0], gradients[1])


def judged_and_credited(recipe: Recipe, batch: Batch) -> Batch:
    batch = add_rewards(recipe, batch)
    if recipe.advantage is not None:
        batch = batch.set(advantage=advantages_of(recipe, batch))
    return batch if recipe.target is None else batch.set(target=value_target(recipe, batch))


def losses_of(recipe: Recipe, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    loss, _ = total_loss(recipe.loss, outputs, batch)
    if not recipe.value_loss:
        return loss, torch.zeros(())
    return loss, total_value_loss(recipe.value_loss, outputs, batch)[0]


def formula_of(name: str) -> Callable[[Case], Losses]:
    if name not in RECIPES:
        pytest.fail(
            f"recipes/rl/{name}.yaml has no formula in reference.py or reference_value_recipes.py of tests/references"
        )
    return RECIPES[name]


def by_formula(formula: Callable[[Case], Losses], inputs: Inputs) -> Step:
    plain, values = inputs.logp.tolist(), inputs.value.tolist()
    lists = read(inputs.batch, judged(inputs.batch))
    losses = formula(lists)
    rows = range(len(plain))
    tokens = [(i, t) for i in rows for t in lists.core.tokens(i)]
    by_logp = reference.gradient(losses.policy, plain, tokens)
    by_value, value_loss, learned = lists.core.zeros(), 0.0, losses.value
    if learned is not None:
        states = [(i, c) for i in rows for c in lists.rows.states(i)]
        value_loss = learned(values, plain)
        by_value = reference.gradient(lambda v, _: learned(v, plain), values, states)
    gradients = [torch.tensor(each, dtype=torch.float64) for each in (by_logp, by_value)]
    return Step(losses.policy(plain, plain), value_loss, gradients[0], gradients[1])


def agree(found: Step, expected: Step) -> None:
    """Asserts that gradients and losses agree to 1e-6, absolutely and relative to their size (they may be small)."""
    for loss, other, gradient, its in (
        (found.loss, expected.loss, found.by_logp, expected.by_logp),
        (found.value_loss, expected.value_loss, found.by_value, expected.by_value),
    ):
        its = its.double()
        size = max(float(its.abs().sum()), 1e-3)
        assert loss == pytest.approx(other, rel=0, abs=1e-6 * min(max(size, abs(other)), 1.0))
        close(gradient / size, its / size)
        close(gradient, its)


@every_recipe
@given(seed=seeds)
@examples(6)
def test_losses_and_gradients_equal_the_formula(name: str, seed: int) -> None:
    inputs = case_of(name, seed)
    agree(taken(load(name), inputs), by_formula(formula_of(name), inputs))


@given(seed=seeds)
@examples(6)
def test_dapo_where_completions_are_overlong(seed: int) -> None:
    """The recipe with a limit that the completions of this test reach; the recipe's own is far above them."""
    inputs = case(seed)
    short = load_recipe(FOLDER / "dapo.yaml", ["--reward.0.limit=5", "--reward.0.buffer=4"])
    formula = without_values(partial(reference.dapo, limit=5, buffer=4))
    agree(taken(short, inputs), by_formula(formula, inputs))
    assert load("dapo").reward[0].options == {"limit": 1024, "buffer": 204} and load("dapo").sampling.max_tokens == 1024


@given(seed=seeds)
@examples(6)
def test_vapo_where_the_length_decides(seed: int) -> None:
    """The recipe with a λ between 0 and 1 at the lengths of this test; the recipe's own is 0 up to 20 tokens."""
    inputs = case(seed)
    short = load_recipe(FOLDER / "vapo.yaml", ["--advantage.alpha=0.5"])
    agree(taken(short, inputs), by_formula(partial(vapo, alpha=0.5), inputs))


@every_recipe
@given(seed=seeds)
@examples(3)
def test_invariance_to_padding(name: str, seed: int) -> None:
    inputs = case_of(name, seed)
    logp, value = (torch.nn.functional.pad(each, (0, 3), value=torch.nan) for each in (inputs.logp, inputs.value))
    found = taken(load(name), Inputs(pad(inputs.batch, 3, torch.nan), logp, value))
    assert bool((found.by_logp[:, -3:] == 0).all()) and bool((found.by_value[:, -3:] == 0).all())
    narrow = found._replace(by_logp=found.by_logp[:, :-3], by_value=found.by_value[:, :-3])
    agree(narrow, taken(load(name), inputs))


@every_recipe
@given(seed=seeds)
@examples(3)
def test_invariance_to_the_order_of_rows(name: str, seed: int) -> None:
    inputs = case_of(name, seed)
    order = torch.randperm(len(inputs.batch), generator=torch.Generator().manual_seed(seed))
    found, back = taken(load(name), inputs.rows(order)), order.argsort()
    in_order = found._replace(by_logp=found.by_logp[back], by_value=found.by_value[back])
    agree(in_order, taken(load(name), inputs))


@every_recipe
@pytest.mark.parametrize("micro", [1, 4])
@given(seed=seeds)
@examples(3)
def test_invariance_to_micro_batches(name: str, micro: int, seed: int) -> None:
    inputs = case_of(name, seed)
    agree(taken(load(name), inputs, micro), taken(load(name), inputs))


@every_recipe
@given(seed=seeds)
@examples(3)
def test_invariance_to_ranks(name: str, seed: int) -> None:
    """Two ranks in lockstep, one with one group, the other with two: losses add up, gradients are those of one rank."""
    inputs = case_of(name, seed)
    recipe, split = load(name), halves(inputs.batch)
    by_rank = {len(rows): inputs.rows(rows) for rows in split}
    assert len(by_rank) == 2

    def on_rank(part: Batch) -> Step:
        return taken(recipe, by_rank[len(part)]._replace(batch=part))

    results = on_ranks([inputs.batch[rows] for rows in split], on_rank)
    by_logp, by_value = torch.zeros_like(inputs.logp), torch.zeros_like(inputs.value)
    for rows, mine in zip(split, results, strict=True):
        by_logp[rows], by_value[rows] = mine.by_logp, mine.by_value
    loss, value_loss = sum(mine.loss for mine in results), sum(mine.value_loss for mine in results)
    agree(Step(loss, value_loss, by_logp, by_value), taken(recipe, inputs))


@every_recipe
@given(seed=seeds)
@examples(3)
def test_no_gradient_off_the_mask_and_the_states(name: str, seed: int) -> None:
    """Gradients are exactly 0 for padding, tokens that the policy did not choose and baselines, whatever they hold."""
    batch, logp, value = case_of(name, seed)
    assert batch.value is not None
    clean = Inputs(batch.set(value=batch.value.nan_to_num(0.0)), logp, value.nan_to_num(0.0))
    found = taken(load(name), Inputs(batch, logp.where(batch.mask, torch.nan), value))
    expected = taken(load(name), clean)
    for step in (found, expected):
        assert step[:2] == expected[:2]
        assert bool((step.by_logp[~batch.mask] == 0).all()) and bool((step.by_value[~batch.states] == 0).all())
        assert all(bool((gradient[batch.baseline_only] == 0).all()) for gradient in (step.by_logp, step.by_value))
    assert torch.equal(found.by_logp, expected.by_logp) and torch.equal(found.by_value, expected.by_value)


@cache
def gradients_by_formula(name: str, labels: bool) -> tuple[Tensor, Tensor]:
    step = by_formula(formula_of(name), case(3, labels=labels))
    return step.by_logp, step.by_value


@every_recipe
def test_the_formula_can_tell_recipes_apart(name: str) -> None:
    """The comparison above can fail: no other recipe's formula gives this recipe's gradients."""
    recipe = load(name)
    found = taken(recipe, case_of(name, 3))

    def distance(other: str) -> float:
        theirs = gradients_by_formula(other, learns_probabilities(recipe))
        return max(float((a - b).abs().max()) for a, b in zip((found.by_logp, found.by_value), theirs, strict=True))

    assert [other for other in RECIPES if distance(other) < 1e-6] == [name]


def test_every_recipe_has_its_formula() -> None:
    missing, stray = set(NAMES) - RECIPES.keys(), RECIPES.keys() - set(NAMES)
    assert not missing, (
        f"no formula in reference.py or reference_value_recipes.py of tests/references for {sorted(missing)}"
    )
    assert not stray, f"a formula without a recipe in recipes/rl: {sorted(stray)}"


def test_a_batch_without_one_token_costs_nothing() -> None:
    for name in NAMES:
        batch, logp, value = case_of(name, 0)
        blank = with_greedy(batch).set(mask=torch.zeros_like(batch.mask), step_id=torch.full_like(batch.step_id, -1))
        step = taken(load(name), Inputs(blank, logp, value))
        assert step[:2] == (0, 0)
        assert bool((step.by_logp == 0).all()) and bool((step.by_value == 0).all())


# ---- every recipe learns, in a world small enough to see through ----------------------------------------------------

TARGET = torch.tensor([2, 0, 3])
STARTS = torch.tensor([0, 1, 5, 21])
"""Number of the first prefix of each length; there are 4 times as many of each length as of the one before."""


def prefixes(tokens: Tensor) -> Tensor:
    """The number of the prefix at each column: ``[N, 3]`` tokens behind a prompt of one token give ``[N, 4]``."""
    powers = 4 ** torch.arange(3)
    digits = torch.stack([(tokens[:, :c] * powers[:c]).sum(-1) for c in range(4)], -1)
    return STARTS + digits


def true_values(logits: Tensor) -> Tensor:
    """The chance of success after each of the 85 prefixes."""
    tokens = torch.cartesian_prod(*[torch.arange(4)] * 3)
    success = ((tokens == TARGET).sum(-1) >= 2).double()
    chosen = logits.double().softmax(-1)[torch.arange(3), tokens]
    index, result = prefixes(tokens), torch.zeros(85, dtype=torch.float64)
    for c in range(4):
        result.index_add_(0, index[:, c], success * chosen[:, c:].prod(-1))
    return result.float()


def right_steps(batch: Batch) -> Tensor:
    """Perfect process model: 1 for each token that is the target's, -1 for the others."""
    return torch.nn.functional.pad(2.0 * (batch.tokens[:, 1:] == TARGET) - 1, (1, 0))


def sample_world(logits: Tensor, values: Tensor, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Completions of three tokens out of four, each a step; the score is 1 if at least two of them are the target's."""
    groups, size = 8, max(recipe.completions, 4)
    greedy_rows = bool(recipe.rollout.options.get("greedy"))
    n = groups * (size + greedy_rows)
    greedy = (torch.arange(n) % (size + greedy_rows) == size) if greedy_rows else torch.zeros(n, dtype=torch.bool)
    drawn = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=generator).T
    tokens = torch.where(greedy[:, None], logits.argmax(-1), drawn)
    score = ((tokens == TARGET).sum(-1) >= 2).float()
    blank = rough_batch(0, groups=groups, size=size + greedy_rows, columns=4, plain=True)
    before = world_logp(logits, tokens).detach()
    mask = (torch.arange(4) > 0).expand(n, 4)
    return blank.set(
        tokens=torch.nn.functional.pad(tokens, (1, 0)),
        mask=mask,
        finish=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, torch.arange(4), -1),
        baseline_only=greedy,
        score=score,
        reward=score.clone(),
        rewards=score[:, None].repeat(1, 2),
        step_reward=torch.zeros(n, 4),
        logp_old=before,
        logp_sampler=before,
        logp_ref=world_logp(torch.zeros_like(logits), tokens),
        value=values[prefixes(tokens)],
    )


def world_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of ``[N, 3]`` tokens, drawn independently at each position, behind a prompt of one token."""
    chosen = logits.log_softmax(-1).expand(len(tokens), 3, 4).gather(-1, tokens[..., None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (1, 0))


REACHED = {"dvpo": 0.75}
"""Success that a recipe reaches, where it is not 0.9: DVPO pays 0.2 a nat for values of the first policy."""


@pytest.mark.engine  # not an engine, but half a minute in all
@every_recipe
def test_every_recipe_learns(name: str) -> None:
    """From 16 % (chance) to above 90 % (or ``REACHED``) in 45 steps of two updates, the second of which is off policy.

    Critics are tables that start at 0, or hold the true values: of the first policy where they are frozen, of the
    policy as it is where they come from branches.
    """
    recipe = with_judge(load(name), right_steps)
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 4, requires_grad=True)
    table = (torch.zeros(85) if recipe.value_loss else true_values(logits.detach())).requires_grad_()
    optimizer = torch.optim.Adam([logits, table], lr=0.1)
    success: list[float] = []
    for _ in range(45):
        branches = recipe.value is not None and recipe.value.branches is not None
        values = true_values(logits.detach()) if branches else table.detach().clone()
        batch = sample_world(logits.detach(), values, recipe, generator)
        success.append(float(batch.score[~batch.baseline_only].mean()))
        ready, rows = prepared(recipe, batch)
        for _ in range(2):
            now = world_logp(logits, batch.tokens[:, 1:]), table[prefixes(batch.tokens[:, 1:])]
            step = updated(recipe, ready, rows, now[0].detach(), now[1].detach())
            optimizer.zero_grad()
            torch.autograd.backward(now, [step.by_logp, step.by_value])
            optimizer.step()
    assert sum(success[:3]) / 3 < 0.35
    assert sum(success[-10:]) / 10 > REACHED.get(name, 0.9)
