"""Combinations of several rewards into one: ``batch -> [N]``, which becomes ``batch.reward``.

The columns of ``batch.rewards`` are the verifiers' values and the rewards of whole completions, each before its weight;
``batch.reward_columns`` has their names and weights. NaN says that a reward does not apply to a completion. What a part
returns for an unscored completion (NaN ``batch.score``) is not used. Sums are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from posttrain.batch import Batch, group_mean, group_std
from posttrain.option_types import Count, NonNegative, Positive, facts

Bounds = Mapping[str, float]
"""Numbers by the name of a reward."""


@facts(keeps_scores=True)
def weighted_sum(batch: Batch) -> Float[Tensor, " N"]:
    """Sum of the rewards that apply, each times the ``weight`` that it has in the recipe."""
    total, columns = batch.reward, batch.reward_columns  # so far the sum of the verifiers
    for k in range(columns.verifiers, len(columns.names)):
        total = total + columns.weights[k] * _known(batch)[:, k]
    return total


@facts(compares_group=True)
def normalised_sum(batch: Batch, *, ddof: Count = 1, eps: NonNegative = 1e-4) -> Float[Tensor, " N"]:
    """Weighted sum of the rewards, each standardised within the group first.

    R_i = Σ_k w_k (r_ik - mean_k) / (std_k + eps), over the rewards that apply to completion i

    Mean and standard deviation are of the group's completions to which reward k applies. Liu et al. 2026 (GDPO),
    arXiv:2601.05242, where ``shape: [{use: whiten}]`` follows; also TRL's ``normalize_then_sum``.

    Args:
        ddof: 1 for the unbiased variance, as TRL takes it; 0 for the biased one.
        eps: added to the standard deviation: 1e-4 in TRL.
    """
    rewards, total = _known(batch).double(), torch.zeros_like(batch.score, dtype=torch.float64)
    for k, weight in enumerate(batch.reward_columns.weights):
        column = rewards[:, k]
        counted = batch.trained & ~column.isnan()
        centred = column - group_mean(column, batch.group, counted)
        spread = group_std(column, batch.group, counted, ddof)
        total = total + weight * (centred / (spread + eps)).where(~column.isnan() & (spread > 0), 0.0)
    return total.float()


def power_mean(batch: Batch, *, p: float = 1.0, floor: Positive = 1e-6) -> Float[Tensor, " N"]:
    """Weighted power mean of the rewards: one number for the welfare of several people or objectives.

    R = (Σ_k w_k max(r_k, floor)^p)^(1/p), the w_k scaled to sum to 1 over the rewards that apply

    p = 1 is the mean (utilitarian), 0 the geometric mean (Nash), -inf the smallest reward (egalitarian), inf the
    largest. Pardeshi et al. 2024 (Learning Social Welfare Functions), arXiv:2405.17700.

    Args:
        p: the exponent; ``.inf`` and ``-.inf`` are the limits.
        floor: smallest reward that is told apart, because powers need positive numbers.

    Raises:
        ValueError: if the weights of the recipe are not all positive.
    """
    weights = torch.tensor(batch.reward_columns.weights, dtype=torch.float64)
    if not bool((weights > 0).all()):
        raise ValueError(f"power_mean needs positive weights of all rewards, not {weights.tolist()}")
    rewards = _known(batch).double()
    applies, logs = ~rewards.isnan(), rewards.clamp(min=floor).log()
    if math.isinf(p):
        logs = logs.where(applies, -p)  # never the largest, or the smallest
        return (logs.amax(-1) if p > 0 else logs.amin(-1)).exp().float()
    shares = (weights * applies).to(logs)
    shares = shares / shares.sum(-1, keepdim=True)
    logs = logs.where(applies, 0.0)
    if p == 0:
        return (shares * logs).sum(-1).exp().float()
    return (torch.logsumexp(shares.log() + p * logs, -1) / p).exp().float()


def first_failing(batch: Batch, *, at_least: Annotated[Bounds, Field(min_length=1)]) -> Float[Tensor, " N"]:
    """Rewards in order of importance: a later one counts only where all earlier ones reach their bounds.

    R = (number of rewards before the first that fails + how far that one is) / K, 1 where none fails

    How far a failing reward is: r_k / bound_k, within 0 and 1 (0 for a bound of 0 or less). A reward that does not
    apply does not fail. A composition of this toolkit's; it has no paper.

    Args:
        at_least: bound of each reward, the most important one first.
    """
    rewards, columns = _known(batch).double(), [batch.reward_columns.index(name) for name in at_least]
    total = torch.zeros_like(batch.score, dtype=torch.float64)
    reached = torch.ones_like(batch.baseline_only)
    for k, bound in zip(columns, at_least.values(), strict=True):
        passes = rewards[:, k].isnan() | (rewards[:, k] >= bound)
        near = (rewards[:, k] / bound).clamp(0, 1) if bound > 0 else torch.zeros_like(total)
        total = total + torch.where(passes, 1.0, near).where(reached, 0.0)
        reached = reached & passes
    return (total / len(columns)).float()


class constrained:  # noqa: N801 - a part is named as in recipes
    """Weighted sum of the other rewards, and a learned multiplier for each bound on the mean of a reward.

    R = Σ_others w_k r_k + Σ_k λ_k s_k (r_k - d_k), then λ_k ← min(max(0, λ_k - η s_k (mean r_k - d_k)), largest)

    s_k is 1 for a lower bound (``at_least``) and -1 for an upper bound (``at_most``). The mean is over the scored
    completions of all ranks to which the reward applies. Projected gradient steps of the multipliers: Tessler et al.
    2018 (RCPO), arXiv:1805.11074. The multipliers are kept in checkpoints, and are metrics.

    Args:
        at_least: lower bounds d_k by reward.
        at_most: upper bounds d_k by reward.
        rate: η, the step of the multipliers after each batch.
        start: λ_k of the first batch.
        largest: largest λ_k.

    Raises:
        ValueError: if there is no bound, or a reward has two.
    """

    def __init__(
        self,
        *,
        at_least: Bounds | None = None,
        at_most: Bounds | None = None,
        rate: Positive = 0.05,
        start: NonNegative = 0.0,
        largest: Positive = 100.0,
    ) -> None:
        bounds = [(name, 1.0, bound) for name, bound in (at_least or {}).items()]
        bounds += [(name, -1.0, bound) for name, bound in (at_most or {}).items()]
        names = [name for name, _, _ in bounds]
        if not names or len(set(names)) < len(names):
            raise ValueError("constrained needs bounds, one a reward: at_least or at_most, with names of rewards")
        self.bounds, self.rate, self.largest = bounds, rate, largest
        self.state: dict[str, float] = dict.fromkeys(names, float(start))

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        rewards, columns = _known(batch).double(), batch.reward_columns
        bound_columns = {columns.index(name) for name in self.state}
        total = torch.zeros_like(batch.score, dtype=torch.float64)
        for k, weight in enumerate(columns.weights):
            if k not in bound_columns:
                total = total + weight * rewards[:, k].nan_to_num(0.0)
        for name, sign, bound in self.bounds:
            slack = sign * (rewards[:, columns.index(name)] - bound)
            total = total + self.state[name] * slack.nan_to_num(0.0)
            counted = batch.trained & ~slack.isnan()
            mean = batch.total(slack.where(counted, 0.0)) / batch.total(counted.double()).clamp(min=1)
            self.state[name] = min(max(0.0, self.state[name] - self.rate * float(mean)), self.largest)
        return total.float()

    def metrics(self) -> dict[str, float]:
        """The multipliers after the last batch, by the names that they have in metrics."""
        return {f"combine/multiplier/{name}": value for name, value in self.state.items()}


def _known(batch: Batch) -> Float[Tensor, "N K"]:
    """The rewards of a batch.

    Raises:
        ValueError: if the batch has none: it was not made by a run.
    """
    if batch.rewards is None:
        raise ValueError("batch.rewards has not been filled: call add_rewards, which combines them")
    return batch.rewards
