"""Every recipe of ``recipes/rl``: its parts, put together as the loop does it, against the paper's formula in loops.

Each also keeps its loss and gradient whatever the padding, the order of rows, the micro-batches and the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given
from parts_cases import close, examples, halves, moved_outputs, on_ranks, pad, rough_batch, seeds, with_greedy
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.compose import credit, reward_batch, total_loss
from posttrain.loading import load_recipe
from posttrain.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "recipes" / "rl"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
every_recipe = pytest.mark.parametrize("name", NAMES)


@cache
def load(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def case(seed: int) -> tuple[Batch, Tensor]:
    """A batch that needs every recipe's care (each rank's half has a greedy completion), and moved log-probs."""
    batch = rough_batch(seed, size=5)
    for rows in halves(batch):
        batch = batch.set(greedy=batch.greedy.index_fill(0, rows[:1], True))
    return batch, moved_outputs(batch, seed, scale=0.5).logp.detach()


def loss_and_gradient(recipe: Recipe, batch: Batch, logp: Tensor, micro: int | None = None) -> tuple[float, Tensor]:
    """One optimiser step's loss and its gradient with respect to the log-probs, in micro-batches of ``micro`` rows."""
    leaf = logp.clone().requires_grad_()
    rows = torch.arange(len(batch))
    for part in recipe.select:
        kept = part(batch)
        batch, rows = batch[kept], rows[kept]
    batch = reward_batch(recipe, batch)
    batch = batch.set(advantage=credit(recipe, batch))
    trained = ~batch.greedy
    for part in recipe.keep:
        trained &= part(batch)
    batch, rows = batch[trained], rows[trained]
    batch = batch.set(weight=recipe.normaliser(batch))
    loss = 0.0
    for index in torch.arange(len(batch)).split(micro or max(len(batch), 1)):
        part_loss, _ = total_loss(recipe.loss, Outputs(logp=leaf[rows[index]]), batch[index])
        part_loss.backward()
        loss += part_loss.item()
    return loss, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def by_formula(recipe: Callable[[reference.Rows], reference.Loss], batch: Batch, logp: Tensor) -> tuple[float, Tensor]:
    rows, plain = reference.read(batch), logp.tolist()
    places = [(i, t) for i in range(len(batch)) for t in rows.tokens(i)]
    formula = recipe(rows)
    return formula(plain, plain), torch.tensor(reference.gradient(formula, plain, places), dtype=torch.float64)


def agree(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    """To 1e-6: absolutely for losses and gradients, and for both relative to the gradient's size (it may be small)."""
    size = max(float(torch.as_tensor(expected[1]).abs().sum()), 1e-3)
    assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-6 * min(size, 1.0))
    close(found[1] / size, torch.as_tensor(expected[1], dtype=torch.float64) / size)
    close(found[1], expected[1])


@every_recipe
@given(seed=seeds)
@examples(10)
def test_loss_and_gradient_equal_the_formula(name: str, seed: int) -> None:
    batch, logp = case(seed)
    agree(loss_and_gradient(load(name), batch, logp), by_formula(reference.RECIPES[name], batch, logp))


@given(seed=seeds)
@examples(10)
def test_dapo_where_completions_are_overlong(seed: int) -> None:
    """The same with a limit that completions of this test reach, as the recipe's own is far above them."""
    batch, logp = case(seed)
    short = load_recipe(FOLDER / "dapo.yaml", ["--reward.0.limit=5", "--reward.0.buffer=4"])
    formula = partial(reference.dapo, limit=5, buffer=4)
    agree(loss_and_gradient(short, batch, logp), by_formula(formula, batch, logp))
    assert load("dapo").reward[0].options == {"limit": 1024, "buffer": 204} and load("dapo").sampling.max_tokens == 1024


@every_recipe
@given(seed=seeds)
@examples(5)
def test_invariance_to_padding(name: str, seed: int) -> None:
    batch, logp = case(seed)
    wide = torch.nn.functional.pad(logp, (0, 3), value=torch.nan)
    loss, gradient = loss_and_gradient(load(name), pad(batch, 3, torch.nan), wide)
    assert bool((gradient[:, -3:] == 0).all())
    agree((loss, gradient[:, :-3]), loss_and_gradient(load(name), batch, logp))


@every_recipe
@given(seed=seeds)
@examples(5)
def test_invariance_to_the_order_of_rows(name: str, seed: int) -> None:
    batch, logp = case(seed)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    loss, gradient = loss_and_gradient(load(name), batch[order], logp[order])
    agree((loss, gradient[order.argsort()]), loss_and_gradient(load(name), batch, logp))


@every_recipe
@pytest.mark.parametrize("micro", [1, 2, 5])
@given(seed=seeds)
@examples(3)
def test_invariance_to_micro_batches(name: str, micro: int, seed: int) -> None:
    batch, logp = case(seed)
    agree(loss_and_gradient(load(name), batch, logp, micro), loss_and_gradient(load(name), batch, logp))


@every_recipe
@given(seed=seeds)
@examples(5)
def test_invariance_to_ranks(name: str, seed: int) -> None:
    """Two ranks in lockstep, one with one group, the other with two: losses add up, gradients are those of one rank."""
    batch, logp = case(seed)
    recipe, split = load(name), halves(batch)
    by_rank = dict(zip([len(rows) for rows in split], split, strict=True))

    def on_rank(part: Batch) -> tuple[float, Tensor]:
        return loss_and_gradient(recipe, part, logp[by_rank[len(part)]])

    results = on_ranks([batch[rows] for rows in split], on_rank)
    gradient = torch.zeros_like(logp)
    for rows, (_, mine) in zip(split, results, strict=True):
        gradient[rows] = mine
    agree((sum(loss for loss, _ in results), gradient), loss_and_gradient(recipe, batch, logp))


@every_recipe
@given(seed=seeds)
@examples(5)
def test_no_gradient_off_the_mask(name: str, seed: int) -> None:
    """Exactly 0, for padding, for tokens that the policy did not choose, for greedy baselines; rubbish or not."""
    batch, logp = case(seed)
    rubbish = logp.where(batch.mask, torch.nan)
    found, expected = loss_and_gradient(load(name), batch, rubbish), loss_and_gradient(load(name), batch, logp)
    for loss, gradient in (found, expected):
        assert loss == expected[0]
        assert bool((gradient[~batch.mask] == 0).all()) and bool((gradient[batch.greedy] == 0).all())
    assert torch.equal(found[1], expected[1])


@every_recipe
def test_the_formula_can_tell_recipes_apart(name: str) -> None:
    """The comparison above has teeth: no other recipe's formula gives this recipe's gradient."""
    batch, logp = case(3)
    found = loss_and_gradient(load(name), batch, logp)[1]
    same = [
        other
        for other, formula in reference.RECIPES.items()
        if float((found - by_formula(formula, batch, logp)[1]).abs().max()) < 1e-6
    ]
    assert same == [name]


def test_every_recipe_has_its_formula() -> None:
    assert set(NAMES) == set(reference.RECIPES)


def test_a_batch_without_one_token_costs_nothing() -> None:
    batch, logp = case(0)
    batch = with_greedy(batch).set(mask=torch.zeros_like(batch.mask))
    for name in NAMES:
        loss, gradient = loss_and_gradient(load(name), batch, logp)
        assert loss == 0 and bool((gradient == 0).all())


# ---- every recipe learns, in a world small enough to see through ----------------------------------------------------

TARGET = torch.tensor([2, 0, 3])


def sample_world(logits: Tensor, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Completions of three tokens out of four; the score is 1 if at least two of them are the target's."""
    groups, size = 8, max(recipe.completions, 1)
    greedy_rows = bool(recipe.rollout.options.get("greedy"))
    n = groups * (size + greedy_rows)
    greedy = (torch.arange(n) % (size + greedy_rows) == size) if greedy_rows else torch.zeros(n, dtype=torch.bool)
    drawn = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=generator).T
    tokens = torch.where(greedy[:, None], logits.argmax(-1), drawn)
    score = ((tokens == TARGET).sum(-1) >= 2).float()
    blank = rough_batch(0, groups=groups, size=size + greedy_rows, columns=4, plain=True)
    before = world_logp(logits, tokens).detach()
    return blank.set(
        tokens=torch.nn.functional.pad(tokens, (1, 0)),
        mask=(torch.arange(4) > 0).expand(n, 4),
        greedy=greedy,
        score=score,
        reward=score.clone(),
        step_reward=torch.zeros(n, 4),
        logp_old=before,
        logp_sampler=before,
        logp_ref=world_logp(torch.zeros_like(logits), tokens),
    )


def world_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of ``[N, 3]`` tokens, drawn independently at each position, behind a prompt of one token."""
    chosen = logits.log_softmax(-1).expand(len(tokens), 3, 4).gather(-1, tokens[..., None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (1, 0))


@every_recipe
def test_every_recipe_learns(name: str) -> None:
    """From 16 % (chance) to above 90 % in 60 steps of two updates, the second of which is off policy."""
    recipe = load(name)
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    success: list[float] = []
    for _ in range(60):
        batch = sample_world(logits.detach(), recipe, generator)
        success.append(float(batch.score[~batch.greedy].mean()))
        for _ in range(2):
            logp = world_logp(logits, batch.tokens[:, 1:])
            _, gradient = loss_and_gradient(recipe, batch, logp.detach())
            optimizer.zero_grad()
            logp.backward(gradient)
            optimizer.step()
    assert sum(success[:3]) / 3 < 0.35
    assert sum(success[-10:]) / 10 > 0.9
