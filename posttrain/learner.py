"""The two passes over a batch that need the policy's weights: scoring before the update, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.batch import Batch, blank_row
from posttrain.compose import total_loss
from posttrain.engines.base import sample_seed
from posttrain.metrics import add_sums, reduce_means, update_sums
from posttrain.models import Policy, forward
from posttrain.needs import Needs
from posttrain.recipe import Recipe
from posttrain.runtime import Runtime, Update, learning_rate, length_groups, micro_batches


@dataclass(frozen=True)
class Learner:
    """The models of a run and what its parts need of them."""

    recipe: Recipe
    runtime: Runtime
    policy: Policy
    reference: Policy | None  # None: not needed, or the policy without its adapters
    needs: Needs


@torch.no_grad()
def score(learner: Learner, batch: Batch) -> Batch:
    """Fills the log-probs and entropies that some part reads before the update, and no others."""
    needs = learner.needs
    learner.policy.eval()
    if needs.scoring_pass:
        logp, entropy = _passes(learner, learner.policy, batch, entropy=needs.entropy)
        batch = batch.set(logp_old=logp, entropy=entropy)
    if needs.logp_ref and learner.reference is not None:
        batch = batch.set(logp_ref=_passes(learner, learner.reference, batch)[0])
    elif needs.logp_ref:
        batch = batch.set(logp_ref=_passes(learner, learner.policy, batch, reference=True)[0])
    return batch


def _passes(
    learner: Learner, model: nn.Module, batch: Batch, *, entropy: bool = False, reference: bool = False
) -> tuple[Tensor, Tensor | None]:
    logp = torch.zeros_like(batch.logp_sampler)
    entropies = torch.zeros_like(logp) if entropy else None
    for rows in length_groups(batch.length, learner.recipe.micro_batch_tokens):
        part = batch[rows].trim().to(learner.runtime.device)
        columns = part.tokens.shape[1]
        temperature = learner.recipe.sampling.temperature
        with learner.runtime.autocast():
            mine, its = model(part.tokens, part.mask, temperature=temperature, entropy=entropy, reference=reference)
        logp[rows, :columns] = mine.cpu()
        if entropies is not None:
            entropies[rows, :columns] = its.cpu()
    return logp, entropies


def update(learner: Learner, batch: Batch, step: int) -> dict[str, float]:
    """All optimiser steps on a batch. Completions that ``keep`` drops, and greedy baselines, have no part in them."""
    recipe, runtime = learner.recipe, learner.runtime
    kept = ~batch.greedy
    for part in recipe.keep:
        kept &= part(batch)
    rate = learning_rate(recipe.optimizer, step, recipe.steps)
    trained = batch[kept] if bool(kept.any()) else blank_row(batch)
    sums: list[dict[str, Tensor]] = []
    losses: dict[str, Tensor] = {}
    updates: list[Update] = []
    for rows in minibatches(recipe, len(trained), step):
        mini = trained[rows] if len(rows) else blank_row(trained)
        mini = mini.set(weight=recipe.normaliser(mini))

        def loss_of(micro: Batch) -> Tensor:
            micro = micro.to(runtime.device)
            entropy = learner.needs.entropy_gradient
            outputs = forward(runtime.model, micro, temperature=recipe.sampling.temperature, entropy=entropy)
            if micro.logp_old is None:
                micro = micro.set(logp_old=outputs.logp.detach())
            loss, terms = total_loss(recipe.loss, outputs, micro)
            for name, value in {"": loss.detach(), **terms}.items():
                losses[name] = losses.get(name, 0) + value.double()
            sums.append(update_sums(outputs, micro))
            return loss

        _seed_dropout(recipe.seed, step, len(updates), runtime.rank)
        micro = micro_batches(mini, recipe.micro_batch_tokens, runtime.all_max)
        updates.append(runtime.update(micro, loss_of, rate))
    skipped = sum(each.skipped for each in updates)
    names = ["loss" if not name else f"loss/{name}" for name in losses]
    totals = (runtime.all_sum(torch.stack(list(losses.values()))) / len(updates)).tolist()
    metrics = dict(zip(names, totals, strict=True)) | reduce_means(add_sums(sums), runtime)
    norm = sum(each.grad_norm for each in updates) / len(updates)
    return metrics | {"grad_norm": norm, "learning_rate": rate, "skipped": float(skipped)}


def minibatches(recipe: Recipe, rows: int, step: int) -> Iterator[list[int]]:
    """Rows of each optimiser step: all in order if there is one, else a fresh shuffle each epoch, cut evenly."""
    if recipe.epochs * recipe.minibatches == 1:
        yield list(range(rows))
        return
    generator = torch.Generator().manual_seed(sample_seed(recipe.seed, step))
    for _ in range(recipe.epochs):
        order = torch.randperm(rows, generator=generator)
        yield from (part.tolist() for part in torch.tensor_split(order, recipe.minibatches))


def _seed_dropout(seed: int, step: int, number: int, rank: int) -> None:
    """Dropout as a function of the step, so that a resumed run repeats it."""
    torch.manual_seed(sample_seed(sample_seed(sample_seed(seed, step), number), rank))
