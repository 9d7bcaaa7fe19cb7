"""Evaluation of a value, reward or process model on held-out completions: its loss, its ranking, its errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from posttrain.batch import Batch
from posttrain.data.examples.dataset_examples import Examples
from posttrain.micro_batches import blank_row, micro_batches
from posttrain.models.joint import JointModel, forward
from posttrain.rollout.collect import index_chunks
from posttrain.training.apply_parts import add_rewards, taught_states, total_value_loss, value_target
from posttrain.training.learner import Learner, score, score_values
from posttrain.training.ranking import ranking_by_value
from posttrain.training.value_metrics import explained_variance, mean


@torch.no_grad()
def evaluate_values(learner: Learner, examples: Examples) -> dict[str, float]:
    """Measures the value model on held-out completions, which are shared over the ranks.

    Returns:
        ``value/loss`` (mean over the batches of a step's size, weighted by their groups, members added up),
        ``value/explained_variance`` and ``value/rmse`` of the targets, and what
        :func:`posttrain.training.ranking.ranking_by_value` gives.
    """
    batches, loss = [], 0.0
    for batch, groups in held_out_batches(learner, examples):
        loss += groups / len(examples) * value_loss_of(learner, batch)
        batches.append(batch)
    share = learner.processes.all_sum
    taught = [(batch.value, batch.target, taught_states(batch)) for batch in batches]
    values = torch.cat([value[states] for value, _, states in taught if value is not None]).double().cpu()
    targets = torch.cat([target[states] for _, target, states in taught if target is not None]).double().cpu()
    quality = {
        "value/loss": loss,
        "value/explained_variance": explained_variance(values, targets, share),
        "value/rmse": mean((values - targets).square(), share) ** 0.5,
    }
    return quality | ranking_by_value(batches, learner.processes)


def held_out_batches(learner: Learner, examples: Examples) -> Iterator[tuple[Batch, int]]:
    """Yields this rank's share of batches of a step's size, with values and targets, and the groups of all ranks.

    A rank without a share gets a row without tokens, because sums over ranks need every rank.
    """
    recipe, processes = learner.recipe, learner.processes
    combine = copy.deepcopy(recipe.combine)  # an evaluation leaves no trace in the memory of a run
    for index in index_chunks(len(examples), recipe.prompts_per_step):
        own_index = processes.share_of(index)
        batch = examples.batch(own_index) if own_index else blank_row(examples.batch(index[:1]))
        batch = add_rewards(recipe, score(learner, batch.set(all_sum=processes.all_sum)), combine)
        for_target = score_values(learner, batch, learner.slow_value) if learner.slow_value is not None else batch
        yield batch.set(target=value_target(recipe, for_target)), len(index)


def value_loss_of(learner: Learner, batch: Batch) -> float:
    """The value loss of a batch over all ranks, computed in micro-batches as the update does, without gradient."""
    recipe, processes = learner.recipe, learner.processes
    assert learner.value is not None
    learner.value.eval()
    batch = batch.set(value_share=recipe.normaliser(batch.set(mask=taught_states(batch))))
    model, total = JointModel(None, learner.value), torch.zeros((), dtype=torch.float64)
    whole_groups = learner.required.groups
    for micro in micro_batches(batch, recipe.micro_batch_tokens, lambda count: count, whole_groups=whole_groups):
        micro = micro.to(processes.device)
        with processes.autocast():
            members = forward(model, micro, temperature=recipe.sampling.temperature, support=learner.value.support)
        total += sum(total_value_loss(recipe.value_loss, member, micro)[0].double().cpu() for member in members)
    return float(processes.all_sum(total))
