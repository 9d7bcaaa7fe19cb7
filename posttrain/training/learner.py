"""The learner: models with their optimiser, and the passes over a batch that need them (scoring, targets, update)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Author, Batch
from posttrain.micro_batches import blank_row, length_groups, micro_batches
from posttrain.models.joint import forward
from posttrain.models.policy import Policy
from posttrain.models.value import ValueModel, backed_up, polyak
from posttrain.recipe.sections import OptimizerSection, ValueSection
from posttrain.seeds import sample_seed
from posttrain.system.processes import Processes
from posttrain.training.apply_parts import taught_states, total_loss, total_value_loss, value_target
from posttrain.training.metrics import PolicyMetrics, update_sums
from posttrain.training.optimiser import Optimiser, Update, learning_rate
from posttrain.training.other_policies import OtherPolicies
from posttrain.training.recipe import Recipe
from posttrain.training.required_passes import RequiredPasses


@dataclass(frozen=True)
class Learner:
    """The models of a run, their optimiser, and the forward passes that the recipe's parts need."""

    recipe: Recipe
    processes: Processes
    optimiser: Optimiser
    policy: Policy
    other_policies: OtherPolicies
    value: ValueModel | None
    slow_value: ValueModel | None  # the target network, if the recipe has one
    required: RequiredPasses

    @property
    def reference(self) -> Policy | None:
        """The reference policy; None if it is not needed, or if it is the policy without its adapters."""
        return self.other_policies.reference

    @property
    def optimizers(self) -> list[OptimizerSection]:
        """Settings of each group of parameters that is trained, in the optimiser's order."""
        value = (self.recipe.value or ValueSection()).optimizer
        return [self.recipe.optimizer] * bool(self.recipe.loss) + [value] * bool(self.recipe.value_loss)


@torch.no_grad()
def score(learner: Learner, batch: Batch) -> Batch:
    """Fills the log-probs, entropies and values that some part reads before the update, and no others."""
    required, temperature = learner.required, learner.recipe.sampling.temperature
    learner.policy.eval()
    if required.scoring_pass:
        filled = _passes(learner, batch, lambda part: _policy_pass(learner.policy, part, temperature, required.entropy))
        batch = batch.set(logp_old=filled[0], entropy=filled[1] if required.entropy else None)
    if required.logp_ref and batch.logp_ref is None:
        batch = batch.set(logp_ref=reference_logp(learner, batch))
    return score_values(learner, batch, learner.value)


@torch.no_grad()
def policy_logp(learner: Learner, batch: Batch) -> Float[Tensor, "N L"]:
    """Log-probs of the policy with its current weights."""
    temperature = learner.recipe.sampling.temperature
    learner.policy.eval()
    return _passes(learner, batch, lambda part: _policy_pass(learner.policy, part, temperature))[0]


@torch.no_grad()
def reference_logp(learner: Learner, batch: Batch) -> Float[Tensor, "N L"]:
    """Log-probs of the reference: a model of its own, or the policy without adapters or before its first step."""
    model, temperature = learner.reference or learner.policy, learner.recipe.sampling.temperature
    without_adapters = learner.reference is None
    learner.policy.eval()
    filled = _passes(learner, batch, lambda part: _policy_pass(model, part, temperature, reference=without_adapters))
    return filled[0]


@torch.no_grad()
def score_values(learner: Learner, batch: Batch, value: ValueModel | None) -> Batch:
    """Fills the values that some part reads."""
    if value is None:
        return batch
    value.eval()
    if learner.required.value:
        batch = batch.set(value=_passes(learner, batch, lambda part: [value(part.tokens, part.states)[0]])[0])
    if learner.required.value_next:
        base, temperature = learner.reference or learner.policy, learner.recipe.sampling.temperature
        kind, beta = value.spec.kind, value.spec.beta

        def of_next(part: Batch) -> list[Tensor]:
            return [backed_up(value, base, part.tokens, part.states, kind, beta, temperature=temperature)]

        batch = batch.set(value_next=_passes(learner, batch, of_next)[0])
    return batch


def _policy_pass(
    model: Policy, part: Batch, temperature: float, entropy: bool = False, *, reference: bool = False
) -> list[Tensor]:
    logp, entropies = model(part.tokens, part.mask, temperature=temperature, entropy=entropy, reference=reference)
    return [logp] if entropies is None else [logp, entropies]


def _passes(learner: Learner, batch: Batch, pass_: Callable[[Batch], list[Tensor]]) -> list[Tensor]:
    """Runs a model over micro-batches and joins the results to tensors [N, L]."""
    whole: list[Tensor] = []
    # Cut as the update cuts: shapes decide the last bits, and the log-ratio to the same policy is then exactly 0.
    together = batch.group if learner.required.groups else None
    for rows in length_groups(batch.length, learner.recipe.micro_batch_tokens, together):
        part = batch[rows].trim().to(learner.processes.device)
        with learner.processes.autocast():
            results = pass_(part)
        whole = whole or [torch.zeros_like(batch.logp_sampler) for _ in results]
        for filled, result in zip(whole, results, strict=True):
            filled[rows, : result.shape[1]] = result.float().cpu()
    return whole


@torch.no_grad()
def add_value_targets(learner: Learner, batch: Batch) -> Batch:
    """Fills ``batch.target`` with what the value model learns, from the target network's values where there is one."""
    if learner.recipe.target is None:
        return batch
    with_values = score_values(learner, batch, learner.slow_value) if learner.slow_value is not None else batch
    target = value_target(learner.recipe, with_values)
    if learner.value is not None and (learner.recipe.value or ValueSection()).normalise:
        learner.value.update_statistics(target, batch.all_sum)
    return batch.set(target=target)


def update(
    learner: Learner, batch: Batch, kept: Bool[Tensor, " N"], step: int, *, policy_waits: bool = False
) -> dict[str, float]:
    """Takes all optimiser steps on the kept completions of a batch.

    Args:
        kept: completions to learn from: see :func:`posttrain.training.apply_parts.kept_for_update`.
        policy_waits: train the value model alone; the policy keeps its weights.
    """
    recipe, processes = learner.recipe, learner.processes
    rates = [learning_rate(options, step, recipe.steps) for options in learner.optimizers]
    if policy_waits:
        rates[0] = 0.0
    trained = batch[kept] if bool(kept.any()) else blank_row(batch)
    measured = PolicyMetrics(recipe.loss)
    losses: dict[str, Tensor] = {}
    updates: list[Update] = []
    for rows in minibatches(learner, trained, step):
        mini = with_shares(recipe, trained[rows] if len(rows) else blank_row(trained))

        def loss_of(micro: Batch) -> Tensor:
            loss, terms = losses_of(learner, micro.to(processes.device), measured, policy_waits)
            for name, value in {"loss": loss.detach(), **terms}.items():
                losses[name] = losses.get(name, 0) + value.double()
            return loss

        _seed_dropout(recipe.seed, step, len(updates), processes.rank)
        micro = micro_batches(mini, recipe.micro_batch_tokens, processes.all_max, whole_groups=learner.required.groups)
        updates.append(learner.optimiser.update(micro, loss_of, rates))
        if learner.slow_value is not None and learner.value is not None and recipe.value is not None:
            polyak(learner.slow_value, learner.value, recipe.value.target_rate or 1.0)
    totals = (processes.all_sum(torch.stack(list(losses.values()))) / len(updates)).tolist()
    metrics = dict(zip(losses, totals, strict=True)) | measured.reduced(processes)
    return metrics | update_metrics(learner, updates, rates)


def with_shares(recipe: Recipe, mini: Batch) -> Batch:
    """Fills the share of each token in the loss of one optimiser step, and of each state in the value loss."""
    if recipe.loss:
        own = [term.normaliser(mini) for term in recipe.loss if term.normaliser is not None]
        mini = mini.set(loss_share=recipe.normaliser(mini), term_share=torch.stack(own, -1) if own else None)
    if recipe.value_loss:
        mini = mini.set(value_share=recipe.normaliser(mini.set(mask=taught_states(mini))))
    return mini


def losses_of(
    learner: Learner, micro: Batch, measured: PolicyMetrics, policy_waits: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and its terms. Comparisons of the policies are added to ``measured``.

    Each member of the value model has a loss of its own; the losses are added up.
    """
    recipe, required = learner.recipe, learner.required
    support = learner.value.support if learner.value is not None else None
    members = forward(
        learner.optimiser.model,
        micro,
        temperature=recipe.sampling.temperature,
        entropy=required.entropy_gradient,
        collision=required.collision,
        kl_from=(learner.reference or learner.policy) if required.kl_ref else None,
        support=support,
    )
    outputs = members[0]
    loss, terms = outputs.logp.new_zeros(()), {}
    if recipe.loss:
        if micro.logp_old is None:
            micro = micro.set(logp_old=outputs.logp.detach())
        policy_loss, parts = total_loss(recipe.loss, outputs, micro)
        # Times 0, not left out: data-parallel wrappers wait for the gradient of everything they wrap.
        loss = loss + (0.0 * policy_loss if policy_waits else policy_loss)
        terms |= {f"loss/{name}": value for name, value in parts.items()}
        given = micro.by(Author.GIVEN) if recipe.examples is None else torch.ones_like(micro.baseline_only)
        measured.add(update_sums(outputs, micro, given))
        measured.add_preferences(outputs, micro)
    for member in members if recipe.value_loss else ():
        value_loss, parts = total_value_loss(recipe.value_loss, member, micro)
        loss = loss + value_loss
        for name, value in parts.items():  # the mean over members
            terms[f"value_loss/{name}"] = terms.get(f"value_loss/{name}", 0.0) + value / len(members)
    return loss, terms


def update_metrics(learner: Learner, updates: list[Update], rates: list[float]) -> dict[str, float]:
    """Gradient norms (mean over the optimiser steps), learning rates, and the number of skipped optimiser steps."""
    norms = [sum(column) / len(updates) for column in zip(*(step.grad_norms for step in updates), strict=True)]
    names = [""] * bool(learner.recipe.loss) + ["value/"] * bool(learner.recipe.value_loss)
    metrics = {f"{name}grad_norm": norm for name, norm in zip(names, norms, strict=True)}
    metrics |= {f"{name}learning_rate": rate for name, rate in zip(names, rates, strict=True)}
    return metrics | {"skipped": float(sum(step.skipped for step in updates))}


def minibatches(learner: Learner, batch: Batch, step: int) -> Iterator[list[int]]:
    """Rows of each optimiser step: all rows if there is one step, else even random shares, drawn again in each epoch.

    Of every ``minibatches`` consecutive rows, counted over all ranks, each step gets one. So the steps are those of a
    run on one process, and ranks are equally busy. If a loss compares the completions of a group, whole groups are
    drawn in place of rows.
    """
    recipe, processes = learner.recipe, learner.processes
    if recipe.epochs * recipe.minibatches == 1:
        yield list(range(len(batch)))
        return
    together = batch.group.tolist() if learner.required.groups else list(range(len(batch)))
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(together):
        units.setdefault(unit, []).append(row)
    rows, counts = list(units.values()), processes.gather(len(units))
    first, many = sum(counts[: processes.rank]), recipe.minibatches
    generator = torch.Generator().manual_seed(sample_seed(recipe.seed, step))
    for _ in range(recipe.epochs):
        draws = torch.rand(math.ceil(sum(counts) / many), many, generator=generator).argsort(-1)
        step_of_unit = draws.flatten()[first : first + len(rows)]  # for this rank's units
        for number in range(many):
            yield [row for unit in (step_of_unit == number).nonzero().squeeze(-1).tolist() for row in rows[unit]]


def _seed_dropout(seed: int, step: int, number: int, rank: int) -> None:
    """Makes dropout a function of the step, so that a resumed run repeats it."""
    torch.manual_seed(sample_seed(sample_seed(sample_seed(seed, step), number), rank))
