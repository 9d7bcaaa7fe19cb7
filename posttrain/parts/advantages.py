"""Advantages ``batch -> [N, L]`` and shapers ``(advantage, batch) -> [N, L]``: float32, zero off the mask.

Unscored completions (NaN reward) and greedy baselines stand outside every statistic and get advantage exactly 0.
Rewards are few, so their statistics are taken in float64: a group of equal rewards gets exactly 0.

Notation: R_i the whole reward of completion i, that is ``reward`` plus the sum of ``step_reward`` over its chosen
tokens; G_i the scored completions of i's group, G of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, broadcast, group_mean, group_std, group_sum, seq_sum

Center = Literal["none", "group", "leave_one_out", "greedy", "length", "batch"]
Scale = Literal["none", "group", "batch"]


def outcome(
    batch: Batch, *, center: Center = "group", scale: Scale = "none", ddof: int = 1, eps: float = 1e-4
) -> Float[Tensor, "N L"]:
    """The completion's reward against a baseline, the same at each of its tokens.

    A_it = (R_i - b_i) / (s_i + eps)

    Args:
        center: the baseline b_i.

            - ``none``: 0.
            - ``group``: mean of the group. Shao et al. 2024 (GRPO), section 4.1.2, arXiv:2402.03300.
            - ``leave_one_out``: mean of the others of the group. Ahmadian et al. 2024 (RLOO), eq. 8, arXiv:2402.14740.
            - ``greedy``: reward of the group's greedy completion. Li et al. 2023 (ReMax), eq. 6, arXiv:2310.10505.
            - ``length``: Σ_G \\|o_j\\| R_j / Σ_G \\|o_j\\|. Hao et al. 2025 (OPO), eq. 6, arXiv:2505.23585.
            - ``batch``: mean over all groups and ranks.

            A completion that is alone in its group has no baseline: ``group``, ``leave_one_out`` and ``length`` give 0.
        scale: the divisor s_i: ``none`` (divides by 1, without eps), standard deviation of the rewards of the
            ``group``, or of the whole ``batch`` on all ranks (Liu et al. 2025, Lite PPO, arXiv:2508.08221).
            Where it is 0, nothing is divided.
        ddof: 1 for the unbiased variance, as TRL and verl take it; 0 for the biased one.
        eps: added to the standard deviation: 1e-4 in TRL, 1e-6 in verl.

    Raises:
        ValueError: for ``greedy`` where the batch holds no greedy completion.
    """
    valid, reward = _rewards(batch)
    centred = reward - _baseline(reward, valid, batch, center)
    if scale != "none":
        by_group = scale == "group"
        std = group_std(reward, batch.group, valid, ddof) if by_group else _batch_std(reward, valid, batch, ddof)
        centred = torch.where(std > 0, centred / (std + eps), centred)
    return broadcast(centred.where(valid, 0.0).float(), batch.mask)


def _rewards(batch: Batch) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """Which completions count, and the whole reward of each, 0 for the unscored."""
    reward = (batch.reward.double() + seq_sum(batch.step_reward.double(), batch.mask)).where(batch.scored, 0.0)
    return batch.scored & ~batch.greedy, reward


def _baseline(
    reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], batch: Batch, center: Center
) -> Float[Tensor, " N"] | float:
    match center:
        case "none":
            return 0.0
        case "group":
            return group_mean(reward, batch.group, valid)
        case "leave_one_out":
            counted = reward.where(valid, 0.0)
            others = group_sum(valid.double(), batch.group) - 1
            return torch.where(others > 0, (group_sum(counted, batch.group) - counted) / others.clamp(min=1), reward)
        case "length":
            length = batch.tokens_chosen.double().where(valid, 0.0)
            total = group_sum(length, batch.group)
            return torch.where(total > 0, group_sum(length * reward, batch.group) / total.clamp(min=1), reward)
        case "batch":
            return batch.total(reward.where(valid, 0.0)) / batch.total(valid).clamp(min=1)
        case "greedy":
            return _greedy_baseline(reward, batch)
    raise ValueError(f"outcome: center must be one of {', '.join(Center.__args__)}, not {center!r}")


def _greedy_baseline(reward: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """Where the greedy completion could not be scored there is no baseline: each completion is its own, advantage 0."""
    if len(batch) and not batch.greedy.any():
        raise ValueError("outcome: center is greedy, but the rollout made no greedy completions")
    scored_greedy = batch.greedy & batch.scored
    found = group_sum(scored_greedy.double(), batch.group) > 0
    return torch.where(found, group_mean(reward, batch.group, scored_greedy), reward)


def _batch_std(reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], batch: Batch, ddof: int) -> Tensor:
    """Standard deviation over all scored completions on all ranks, in two passes."""
    count = batch.total(valid)
    mean = batch.total(reward.where(valid, 0.0)) / count.clamp(min=1)
    squares = batch.total((reward - mean).where(valid, 0.0).square())
    return (squares / (count - ddof).clamp(min=1)).sqrt()
