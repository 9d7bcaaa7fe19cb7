"""Advantages ``batch -> [N, L]`` and shapers ``(advantage, batch) -> [N, L]``: float32, zero off the mask.

Unscored completions (NaN reward) and greedy baselines stand outside every statistic and get advantage exactly 0.
Rewards are few, so their statistics are taken in float64: a group of equal rewards gets exactly 0.

Notation: R_i the whole reward of completion i, that is ``reward`` plus the sum of ``step_reward`` over its chosen
tokens; G_i the scored completions of i's group, G of them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, broadcast, group_mean, group_std, group_sum, seq_mean, seq_sum
from posttrain.option_types import Count, Fraction, NonNegative, Option, Positive, facts
from posttrain.parts.credit import (
    Truncated,
    accumulate,
    at_following,
    at_state,
    last_chosen,
    open_ended,
    row_lambda,
    step_ends,
    step_starts,
    token_rewards,
)
from posttrain.parts.credit import valid_rows as _valid
from posttrain.parts.ratio import needed

Center = Literal["none", "group", "leave_one_out", "greedy", "length", "batch"]
Scale = Literal["none", "group", "batch"]


def _by_group(options: Option) -> bool:
    """True if the baseline or the scale comes from the completions of the same prompt."""
    return bool({options["center"], options.get("scale")} & {"group", "leave_one_out", "length"})


@facts(compares_group=_by_group)
def outcome(
    batch: Batch, *, center: Center = "group", scale: Scale = "none", ddof: Count = 1, eps: NonNegative = 1e-4
) -> Float[Tensor, "N L"]:
    """The completion's reward against a baseline, the same at each of its tokens.

    A_it = (R_i - b_i) / (s_i + eps)

    Args:
        center: the baseline b_i.

            - ``none``: 0.
            - ``group``: mean of the group. Shao et al. 2024 (GRPO), section 4.1.2, arXiv:2402.03300.
            - ``leave_one_out``: mean of the others of the group. Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
            - ``greedy``: reward of the group's greedy completion. Li et al. 2023 (ReMax), arXiv:2310.10505.
            - ``length``: Σ_G |o_j| R_j / Σ_G |o_j|. Hao et al. 2025 (OPO), arXiv:2505.23585.
            - ``batch``: mean over all groups and ranks.

            A completion that is alone in its group has no baseline: ``group``, ``leave_one_out`` and ``length`` give 0.
        scale: the divisor s_i. Where it is 0, nothing is divided.

            - ``none``: nothing is divided.
            - ``group``: standard deviation of the group's rewards. Shao et al. 2024 (GRPO), arXiv:2402.03300.
            - ``batch``: of all rewards on all ranks. Liu et al. 2025 (Lite PPO), arXiv:2508.08221.
        ddof: 1 for the unbiased variance, as TRL and verl take it; 0 for the biased one.
        eps: added to the standard deviation: 1e-4 in TRL, 1e-6 in verl.

    Raises:
        ValueError: for ``greedy`` where the batch holds no greedy completion.
    """
    valid = _valid(batch)
    reward = _scored(batch.reward.double() + seq_sum(batch.step_reward.double(), batch.mask), batch)
    centred = reward - _baseline(reward, valid, batch, center)
    if scale != "none":
        std = _spread(reward, valid, batch, scale, ddof)
        centred = torch.where(std > 0, centred / (std + eps), centred)
    return broadcast(centred.where(valid, 0.0).float(), batch.mask)


@facts(compares_group=_by_group)
def returns(
    batch: Batch,
    *,
    gamma: Fraction = 1.0,
    center: Center = "none",
    step_center: Literal["none", "leave_one_out"] = "none",
) -> Float[Tensor, "N L"]:
    """Sum of the rewards from each token on, discounted per token that the policy chose.

    A_t = r_t + γ A_t', with t' the next chosen token

    Sutton and Barto 2018, eq. 3.9.
    With a KL penalty in ``step_reward``: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262.

    r_t is ``step_reward`` and, at the completion's last chosen token, ``reward`` - b too. Tokens in between that the
    policy did not choose (tool output) are stepped over.

    Args:
        center: the baseline b of ``reward`` alone, as in ``outcome``.
        step_center: ``leave_one_out`` subtracts from each token's ``step_reward`` the mean over the group's other
            completions of their mean over tokens. Cui et al. 2025 (PRIME), eq. 5, arXiv:2502.01456.
    """
    valid, outcome_reward = _valid(batch), _scored(batch.reward.double(), batch)
    outcome_reward = outcome_reward - _baseline(outcome_reward, valid, batch, center)
    process = batch.step_reward.double().where(batch.mask, 0.0)
    if step_center == "leave_one_out":
        process = process - broadcast(_others_mean(seq_mean(process, batch.mask), batch), batch.mask)
    rewards = process + broadcast(outcome_reward, last_chosen(batch.mask))
    return _trained(accumulate(rewards, batch.mask, gamma), batch)


def gae(
    batch: Batch,
    *,
    gamma: Fraction = 1.0,
    lambda_: Fraction = 0.95,
    alpha: Positive | None = None,
    truncated: Truncated = "bootstrap",
) -> Float[Tensor, "N L"]:
    """Generalised advantage estimate: decayed sum of the critic's one-step errors from each token on.

    A_t = δ_t + γ λ A_t',  δ_t = r_t + γ V(s_t') - V(s_t), with t' the next chosen token

    Schulman et al. 2016 (GAE), eq. 16, arXiv:1506.02438; λ of 0.95 and γ of 1: Ouyang et al. 2022, arXiv:2203.02155.

    r_t is ``step_reward``, and at the last chosen token ``reward`` too. λ = 1 gives the return minus V(s_t).

    Args:
        gamma: discount a chosen token.
        alpha: λ = max(0, 1 - 1 / (α · tokens)) instead: 0.05 in Yue et al. 2025 (VAPO), eq. 10, arXiv:2504.05118.
        truncated: ``bootstrap`` takes the value at the last token of a completion that was cut off for what would have
            followed; ``end`` takes it as an ending.
    """
    value, cut = _value(batch), open_ended(batch, truncated)
    before = at_state(value, batch.mask)
    after = torch.where(cut, value, at_following(before, batch.mask))
    errors = (token_rewards(batch) + gamma * after - before).where(batch.mask, 0.0)
    return _trained(accumulate(errors, batch.mask, gamma * row_lambda(batch, lambda_, alpha)), batch)


def value_change(
    batch: Batch, *, level: Literal["token", "step"] = "token", last: Literal["value", "reward"] = "value"
) -> Float[Tensor, "N L"]:
    """How much each token changed the value: the advantage where rewards come at the end and γ is 1.

    A_t = V(s_t') - V(s_t), with t' the next chosen token; these add up to V of the whole completion minus V(s_0)

    Huang et al. 2025 (DVPO), arXiv:2502.16944, with a value model that stays as it is.
    By steps, with V from Monte-Carlo branches: Kazemnejad et al. 2025 (VinePPO), section 4, arXiv:2410.01679.

    Args:
        level: ``step`` gives each token what its whole reasoning step changed; only values at the states before steps
            are read, and at the end.
        last: what follows the last chosen token: the model's ``value`` of the whole completion, or its ``reward``.
            Taking 0 instead, as a critic's bootstrap does, would punish every ending that was worth something.
    """
    value, ends = _value(batch), last_chosen(batch.mask)
    final = value if last == "value" else _scored(batch.reward.double(), batch)[:, None]
    starts = step_starts(batch) if level == "step" else batch.mask
    before = at_state(value, batch.mask).where(starts, 0.0)
    after = torch.where(last_chosen(starts), final.where(ends, 0.0).sum(-1, keepdim=True), at_following(before, starts))
    changes = (after - before).where(starts, 0.0)
    index = (starts.cumsum(-1) - 1).clamp(min=0)  # of the step that each token belongs to
    per_step = torch.zeros_like(changes).scatter_add(-1, index, changes)
    return _trained(per_step.gather(-1, index), batch)


def static_q(batch: Batch) -> Float[Tensor, "N L"]:
    """The value of each token as it is, without a baseline.

    A_t = Q(s_t, y_t) = V(prefix that ends with y_t)

    Huang et al. 2025 (DVPO, static Q), arXiv:2502.16944. Goes with the shaper ``whiten``.
    """
    return _trained(_value(batch), batch)


def min_form(batch: Batch, *, temperature: Positive = 0.1, baseline: bool = True) -> Float[Tensor, "N L"]:
    """Return that lets a completion be as good as its worst step: the worst outweighs the others.

    G_t = Σ_k>=t r*_k + R,  r*_k = softmax_k(-r_k / T) r_k over the completion's steps
    A_it = G_it - b_i,  b_i = Σ_j≠i Σ_t G_jt / ((G - 1) max_j |o_j|) over the group

    Cheng et al. 2025 (PURE), arXiv:2504.15275. Goes with the shaper ``whiten``.

    r_k is ``step_reward`` at the last token of step k, and R ``reward``, at the last token. What ``step_reward`` holds
    at other tokens counts as it is.

    Args:
        temperature: T; near 0 only the worst step counts, up to itself.
        baseline: subtract b_i, a constant over the completion's tokens.
    """
    ends, process = step_ends(batch), batch.step_reward.double()
    share = torch.softmax((-process / temperature).where(ends, -torch.inf), -1).where(ends, 0.0)
    rewards = token_rewards(batch) + (share * process - process).where(ends, 0.0)
    gains = accumulate(rewards, batch.mask, 1.0).where(batch.mask, 0.0)
    return _trained(gains - _token_baseline(gains, batch)[:, None] if baseline else gains, batch)


def whiten(
    advantage: Float[Tensor, "N L"], batch: Batch, *, shift: bool = True, ddof: Count = 0, eps: NonNegative = 1e-8
) -> Float[Tensor, "N L"]:
    """Scaled to unit variance, and shifted to mean 0, over the chosen tokens of all scored completions on all ranks.

    A' = (A - mean) / sqrt(var + eps), plus mean where ``shift`` is off

    Huang et al. 2024 (N+ details of RLHF), arXiv:2403.17031.
    In place of a value model: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262.

    Args:
        shift: subtract the mean.
        ddof: 0 for the biased variance, as OpenRLHF and the reference code of RLHF take it; 1 as in verl.
    """
    counted = batch.mask & _valid(batch)[:, None]
    values = advantage.double().where(counted, 0.0)
    mean, variance = _moments(values, counted, batch, ddof)
    whitened = (values - mean) * torch.rsqrt(variance + eps) + (0.0 if shift else mean)
    return whitened.where(counted, 0.0).float()


def _trained(advantage: Float[Tensor, "N L"], batch: Batch) -> Float[Tensor, "N L"]:
    return advantage.where(batch.mask & _valid(batch)[:, None], 0.0).to(batch.reward.dtype)


def _value(batch: Batch) -> Float[Tensor, "N L"]:
    return needed(batch, "value").double().where(batch.states, 0.0)


def _others_mean(values: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """The mean over the other valid completions of the group; a completion without others is its own."""
    valid = _valid(batch)
    counted = values.where(valid, 0.0)
    others = group_sum(valid.double(), batch.group) - 1
    return torch.where(others > 0, (group_sum(counted, batch.group) - counted) / others.clamp(min=1), values)


def _token_baseline(gains: Float[Tensor, "N L"], batch: Batch) -> Float[Tensor, " N"]:
    """What the others of the group gain per token, over the length of the group's longest; 0 where there are none."""
    valid = _valid(batch)
    total = gains.sum(-1).where(valid, 0.0)
    others = group_sum(valid.double(), batch.group) - 1
    length = batch.tokens_chosen.double().where(valid, 0.0)
    _, index = batch.group.unique(return_inverse=True)
    longest = torch.zeros_like(length).scatter_reduce(0, index, length, "amax")[index]
    return (group_sum(total, batch.group) - total) / (others * longest).clamp(min=1)


def _scored(reward: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    return reward.where(batch.scored, 0.0)


def _baseline(
    reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], batch: Batch, center: Center
) -> Float[Tensor, " N"] | float:
    match center:
        case "none":
            return 0.0
        case "group":
            return group_mean(reward, batch.group, valid)
        case "leave_one_out":
            return _others_mean(reward, batch)
        case "length":
            length = batch.tokens_chosen.double().where(valid, 0.0)
            total = group_sum(length, batch.group)
            return torch.where(total > 0, group_sum(length * reward, batch.group) / total.clamp(min=1), reward)
        case "batch":
            return _moments(reward, valid, batch)[0]
        case "greedy":
            return _greedy_baseline(reward, batch)
    raise ValueError(f"outcome: center must be one of {', '.join(get_args(Center))}, not {center!r}")


def _spread(
    reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], batch: Batch, scale: Scale, ddof: int
) -> Float[Tensor, " N"] | Float[Tensor, ""]:
    match scale:
        case "group":
            return group_std(reward, batch.group, valid, ddof)
        case "batch":
            return _moments(reward, valid, batch, ddof)[1].sqrt()
    raise ValueError(f"outcome: scale must be one of {', '.join(get_args(Scale))}, not {scale!r}")


def _greedy_baseline(reward: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """Where the greedy completion could not be scored there is no baseline: each completion is its own, advantage 0."""
    if _valid(batch).any() and not batch.baseline_only.any():
        raise ValueError("outcome: center is greedy, but the rollout made no greedy completions")
    scored_greedy = batch.baseline_only & batch.scored
    found = group_sum(scored_greedy.double(), batch.group) > 0
    return torch.where(found, group_mean(reward, batch.group, scored_greedy), reward)


def _moments(values: Tensor, counted: Tensor, batch: Batch, ddof: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance over what is counted on all ranks, in two passes; 0 where too little is counted."""
    count = batch.total(counted)
    mean = batch.total(values.where(counted, 0.0)) / count.clamp(min=1)
    squares = batch.total((values - mean).where(counted, 0.0).square())
    return mean, squares / (count - ddof).clamp(min=1)
