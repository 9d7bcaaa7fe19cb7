"""Applies the parts of a recipe to a batch: rewards, advantages, baselines, targets and losses, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, RewardColumns
from posttrain.recipe.part import Part
from posttrain.training.recipe import Recipe


def add_rewards(recipe: Recipe, batch: Batch, combine: Part | None = None) -> Batch:
    """Fills ``rewards``, ``reward`` and ``step_reward`` of a batch with the recipe's rewards.

    Reward parts of ``[N]`` become columns of ``rewards`` beside the verifiers' values, and ``combine`` makes one number
    of all columns. Reward parts of ``[N, L]`` are added to ``step_reward``. Every reward part sees the batch as it was
    before any of them, so their order does not matter.

    Args:
        combine: takes the place of the recipe's, such as a copy of it that may remember the batch.

    Raises:
        ValueError: if a part returns another shape, or a number that is not finite for a scored completion.
    """
    step_reward, whole = batch.step_reward, with_verifiers(batch)
    for part in recipe.reward:
        value = _checked_reward(part, batch)
        if value.dim() == 1:
            whole = with_reward(whole, part, value)
        else:
            step_reward = step_reward + (part.weight * value).where(batch.mask, 0.0)
    return combined(combine or recipe.combine, whole.set(step_reward=step_reward))


def with_verifiers(batch: Batch) -> Batch:
    """Fills ``batch.rewards`` if no verifier has: given completions have their rating, named ``score``, alone."""
    if batch.rewards is not None:
        return batch
    return batch.set(rewards=batch.score[:, None], reward_columns=RewardColumns(("score",), (1.0,), verifiers=1))


def with_reward(batch: Batch, part: Part, value: Float[Tensor, " N"]) -> Batch:
    """Adds a column to ``batch.rewards``; a name that is there already gets a number: length, length_2."""
    assert batch.rewards is not None
    columns = batch.reward_columns
    named = RewardColumns((*columns.names, unused(part.name, columns.names)), (*columns.weights, part.weight))
    rewards = torch.cat([batch.rewards, value.to(batch.rewards)[:, None]], -1)
    return batch.set(rewards=rewards, reward_columns=dataclasses.replace(named, verifiers=columns.verifiers))


def combined(combine: Part, batch: Batch) -> Batch:
    """Fills ``batch.reward`` by a part of the slot ``combine``. Unscored completions stay unscored.

    Raises:
        ValueError: if the part returns another shape, or a number that is not finite for a scored completion.
    """
    reward = combine(batch)
    if reward.shape != batch.score.shape or not bool(reward[batch.scored].isfinite().all()):
        name, expected = combine.name, f"{len(batch)} numbers, finite for scored completions"
        raise ValueError(f"part {name!r} returned {list(reward.shape)}; expected {expected}")
    return batch.set(reward=reward.to(batch.reward).where(batch.scored, float("nan")))


def _checked_reward(part: Part, batch: Batch) -> Tensor:
    """The reward ``[N]`` or ``[N, L]`` of a part before its weight."""
    value = part(batch)
    if value.shape not in (batch.reward.shape, batch.mask.shape):
        expected = f"{list(batch.reward.shape)} (one a completion) or {list(batch.mask.shape)} (one a token)"
        raise ValueError(f"reward part {part.name!r} returned shape {list(value.shape)}, expected {expected}")
    counted = batch.mask & batch.scored[:, None] if value.dim() == 2 else batch.scored
    wrong = counted & ~value.isfinite()
    if rows := (wrong.any(-1) if wrong.dim() == 2 else wrong).nonzero().squeeze(-1).tolist():
        raise ValueError(f"reward part {part.name!r} gave a reward that is not finite to completions {rows[:8]}")
    return value


def compare_completions(recipe: Recipe, batch: Batch) -> Batch:
    """Replaces the rewards by the results of comparing completions, if the recipe has a ``compare``.

    Raises:
        ValueError: if the part returns another shape, or a number that is not finite for a scored completion.
    """
    if recipe.compare is None:
        return batch
    reward = recipe.compare(batch)
    if reward.shape != batch.reward.shape or not bool(reward[batch.scored].isfinite().all()):
        name, expected = recipe.compare.name, f"{len(batch)} finite numbers"
        raise ValueError(f"part {name!r} returned {list(reward.shape)}; expected {expected}")
    return batch.set(reward=reward.to(batch.reward).where(batch.scored, float("nan")))


def advantages_of(recipe: Recipe, batch: Batch) -> Float[Tensor, "N L"]:
    """The advantage of each token: the recipe's advantage, then its shapers in order. Float32, zero off the mask.

    Completions that are unscored or baselines only get exactly 0, whatever the parts return for them.

    Raises:
        ValueError: if a part returns another shape, or a number that is not finite.
    """
    assert recipe.advantage is not None
    trained = batch.mask & batch.trained[:, None]
    advantage = _checked(recipe.advantage, recipe.advantage(batch), trained)
    for part in recipe.shape:
        advantage = _checked(part, part(advantage, batch), trained)
    return advantage


def add_advantages(recipe: Recipe, batch: Batch) -> Batch:
    """Fills ``batch.advantage``, if the recipe has an ``advantage``."""
    return batch if recipe.advantage is None else batch.set(advantage=advantages_of(recipe, batch))


def _checked(part: Part, advantage: Tensor, trained: Tensor) -> Float[Tensor, "N L"]:
    if advantage.shape != trained.shape:
        raise ValueError(f"part {part.name!r} returned shape {list(advantage.shape)}, expected {list(trained.shape)}")
    advantage = advantage.float().where(trained, 0.0)
    rows = (~advantage.isfinite()).any(-1).nonzero().squeeze(-1).tolist()
    if rows:
        raise ValueError(f"part {part.name!r} gave an advantage that is not finite in completions {rows[:8]}")
    return advantage


def add_baselines(recipe: Recipe, batch: Batch) -> Batch:
    """Fills ``batch.baseline`` from the slot ``baseline``, and replaces ``batch.group`` by the result of ``regroup``.

    Raises:
        ValueError: if a part returns another shape, or a number that is not finite.
    """
    for field, part in (("baseline", recipe.baseline), ("group", recipe.regroup)):
        if part is not None:
            values = part(batch)
            if values.shape != batch.reward.shape or not bool(values.isfinite().all()):
                raise ValueError(
                    f"part {part.name!r} returned {list(values.shape)}; expected {len(batch)} finite numbers"
                )
            batch = batch.set(**{field: values})
    return batch


def kept_for_update(recipe: Recipe, batch: Batch) -> Bool[Tensor, " N"]:
    """True for the completions that the update learns from: no baselines, and none that ``keep`` leaves out."""
    kept = ~batch.baseline_only
    for part in recipe.keep:
        kept = kept & part(batch)
    return kept


def value_target(recipe: Recipe, batch: Batch) -> Float[Tensor, "N L"]:
    """The target of the value model at each state, float32; NaN where there is nothing to learn.

    Completions that are unscored or baselines only have no targets, whatever the part returns for them.

    Raises:
        ValueError: if the part returns another shape, or an infinite number.
    """
    assert recipe.target is not None
    part, target = recipe.target, recipe.target(batch)
    if target.shape != batch.mask.shape:
        expected = list(batch.mask.shape)
        raise ValueError(f"target part {part.name!r} returned shape {list(target.shape)}, expected {expected}")
    taught = batch.states & batch.trained[:, None]
    target = target.float().where(taught, float("nan"))
    if rows := target.isinf().any(-1).nonzero().squeeze(-1).tolist():
        raise ValueError(f"target part {part.name!r} gave an infinite target in completions {rows[:8]}")
    return target


def taught_states(batch: Batch) -> Bool[Tensor, "N L"]:
    """True at the states whose value has a target.

    Raises:
        ValueError: if the targets are missing.
    """
    if batch.target is None:
        raise ValueError("batch.target has not been filled: call the recipe's target on the whole batch first")
    return ~batch.target.isnan()


def total_loss(loss_parts: Sequence[Part], outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch or micro-batch, and the value of each term before its coefficient, by the term's name.

    loss = Σ_i coef_i Σ_nl term_i · Π_j weight_ij · batch.loss_share

    A term with a normaliser of its own uses its slice of ``batch.term_share`` in place of ``batch.loss_share``. Shares
    come from sums over the global batch, so losses and term values add up over micro-batches and ranks.

    Raises:
        ValueError: if the shares are missing.
    """
    if batch.loss_share is None:
        raise ValueError("batch.loss_share has not been filled: call the recipe's normaliser on the whole batch first")
    shares = [batch.loss_share] * len(loss_parts)
    with_their_own = [i for i, part in enumerate(loss_parts) if part.normaliser is not None]
    for i, share in zip(with_their_own, () if batch.term_share is None else batch.term_share.unbind(-1), strict=True):
        shares[i] = share
    return _sum_of_terms(loss_parts, outputs, batch, batch.mask, shares)


def total_value_loss(loss_parts: Sequence[Part], outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Like :func:`total_loss`, but summed over the states that have a target and weighted by ``batch.value_share``.

    Raises:
        ValueError: if the shares or the targets are missing.
    """
    if batch.value_share is None:
        raise ValueError("batch.value_share has not been filled: call the recipe's normaliser on the states first")
    return _sum_of_terms(loss_parts, outputs, batch, taught_states(batch), [batch.value_share] * len(loss_parts))


def _sum_of_terms(
    parts: Sequence[Part], outputs: Outputs, batch: Batch, counted: Tensor, shares: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    loss, terms = outputs.logp.new_zeros(()), {}
    for part, share in zip(parts, shares, strict=True):
        term = part(outputs, batch)
        for weight in part.weights:
            term = term * weight(outputs, batch).detach()
        value = (term.where(counted, 0.0) * share).sum()
        loss = loss + part.coef * value
        terms[unused(part.name, terms)] = value.detach()
    return loss, terms


def unused(name: str, taken: Collection[str]) -> str:
    """The name, with a number if it is taken: kl, kl_2, kl_3."""
    numbered, count = name, 1
    while numbered in taken:
        count += 1
        numbered = f"{name}_{count}"
    return numbered
