"""Advantages ``batch -> [N, L]`` and shapers ``(advantage, batch) -> [N, L]``: float32, zero off the mask.

Unscored completions (NaN reward) and baselines (``batch.baseline_only``) are left out of every statistic and get
advantage exactly 0. Rewards are few, so their statistics are taken in float64: a group of equal rewards gets exactly 0.

Notation: R_i is the whole reward of completion i, that is ``reward`` plus the sum of ``step_reward`` over its chosen
tokens; G_i are the scored completions of i's group, G of them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, broadcast, group_mean, group_std, group_sum, seq_mean, seq_sum
from posttrain.option_types import Count, Fraction, NonNegative, Option, Positive, PositiveCount, facts
from posttrain.parts.credit import (
    Truncated,
    accumulate,
    at_following,
    at_state,
    last_chosen,
    open_ended,
    row_lambda,
    step_starts,
    token_rewards,
)
from posttrain.parts.ratio import needed

Center = Literal["none", "group", "leave_one_out", "greedy", "length", "batch"]
Scale = Literal["none", "group", "batch"]


def _by_group(options: Option) -> bool:
    """True if the baseline or the scale comes from the completions of the same prompt."""
    compared = {"group", "leave_one_out", "length"}
    return bool({options["center"], options.get("scale")} & compared or options.get("token_center"))


@facts(compares_group=_by_group)
def outcome(
    batch: Batch, *, center: Center = "group", scale: Scale = "none", ddof: Count = 1, eps: NonNegative = 1e-4
) -> Float[Tensor, "N L"]:
    """Advantage of each token: the completion's reward minus a baseline, the same number at all of its tokens.

    A_it = (R_i - b_i) / (s_i + eps)

    Args:
        center: the baseline b_i.

            - ``none``: 0.
            - ``group``: mean of the group. Shao et al. 2024 (GRPO), section 4.1.2, arXiv:2402.03300.
            - ``leave_one_out``: mean of the group's other completions. Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
            - ``greedy``: reward of the group's greedy completion. Li et al. 2023 (ReMax), arXiv:2310.10505.
            - ``length``: Σ_G |o_j| R_j / Σ_G |o_j|. Hao et al. 2025 (OPO), arXiv:2505.23585.
            - ``batch``: mean over all groups and ranks.

            A completion that is alone in its group has no baseline: ``group``, ``leave_one_out`` and ``length`` give 0.
        scale: the divisor s_i. Where it is 0, nothing is divided.

            - ``none``: nothing is divided.
            - ``group``: standard deviation of the group's rewards. Shao et al. 2024 (GRPO), arXiv:2402.03300.
            - ``batch``: standard deviation of all rewards on all ranks. Liu et al. 2025 (Lite PPO), arXiv:2508.08221.
        ddof: 1 for the unbiased variance, as TRL and verl take it; 0 for the biased one.
        eps: added to the standard deviation: 1e-4 in TRL, 1e-6 in verl.

    Raises:
        ValueError: for ``greedy`` where the batch holds no greedy completion.
    """
    valid = batch.trained
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
    step_sum: Literal["to_go", "own"] = "to_go",
    token_center: PositiveCount | None = None,
) -> Float[Tensor, "N L"]:
    """Advantage of each token: the sum of the rewards from it on, discounted per token that the policy chose.

    A_t = r_t + γ A_t', with t' the next chosen token

    Sutton and Barto 2018.
    With a KL penalty in ``step_reward``: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262.

    r_t is ``step_reward`` and, at the completion's last chosen token, ``reward`` - b too. Tokens in between that the
    policy did not choose (tool output) are stepped over.

    Args:
        center: the baseline b of ``reward`` alone, as in ``outcome``.
        step_center: ``leave_one_out`` subtracts from each token's ``step_reward`` the mean over the group's other
            completions of their mean over tokens. Cui et al. 2025 (PRIME), arXiv:2502.01456.
        step_sum: ``own`` gives each token its own ``step_reward`` alone, and the sum of later ones to none. For a KL
            penalty as in the code of Li et al. 2023 (ReMax), arXiv:2310.10505.
        token_center: N, the most tokens that a completion can have (``sampling.max_tokens``): subtracts
            Σ_j≠i Σ_t A_jt / ((G - 1) N) from each token of completion i, over its group of G. Cheng et al. 2025 (PURE),
            arXiv:2504.15275. A constant N keeps short groups from large baselines. Completions alone have none.
    """
    outcome_reward = _scored(batch.reward.double(), batch)
    outcome_reward = outcome_reward - _baseline(outcome_reward, batch.trained, batch, center)
    process = batch.step_reward.double().where(batch.mask, 0.0)
    if step_center == "leave_one_out":
        process = process - broadcast(_others_mean(seq_mean(process, batch.mask), batch), batch.mask)
    final = broadcast(outcome_reward, last_chosen(batch.mask))
    if step_sum == "own":
        gains = process + accumulate(final, batch.mask, gamma)
    else:
        gains = accumulate(process + final, batch.mask, gamma)
    if token_center is not None:
        gains = gains - _token_baseline(gains, batch, token_center)[:, None]
    return _trained(gains, batch)


def gae(
    batch: Batch,
    *,
    gamma: Fraction = 1.0,
    lambda_: Fraction = 0.95,
    alpha: Positive | None = None,
    truncated: Truncated = "end",
    last: Literal["reward", "value", "zero"] = "reward",
) -> Float[Tensor, "N L"]:
    """Generalised advantage estimate: decayed sum of the critic's one-step errors from each token on.

    A_t = δ_t + γ λ A_t',  δ_t = r_t + γ V(s_t') - V(s_t), with t' the next chosen token

    Schulman et al. 2015 (GAE), eq. 16, arXiv:1506.02438; λ of 0.95 and γ of 1: Huang et al. 2024, arXiv:2403.17031.

    r_t is ``step_reward``, and at the last chosen token ``reward`` too. λ = 1 gives the return minus V(s_t).

    Args:
        gamma: discount per chosen token.
        alpha: λ = max(0, 1 - 1 / (α · tokens)) instead: 0.05 in Yue et al. 2025 (VAPO), section 4.2, arXiv:2504.05118.
        truncated: ``end`` treats the cut of a completion at the length limit as its ending, as Huang et al. 2024, verl
            and OpenRLHF do. ``bootstrap`` takes the value at its last token in place of the rewards that would have
            followed.
        last: what an ending is worth. ``reward``: ``reward``. Without a reward, for a value model that was trained
            beforehand: ``value``, its value of the whole completion, or ``zero``, as in the code of Huang et al. 2025
            (DVPO), arXiv:2502.16944, where the last token's advantage does not depend on that token.
    """
    value, ends = _value(batch), last_chosen(batch.mask)
    value_now = at_state(value, batch.mask)
    beyond = ends if last == "value" else open_ended(batch, truncated)
    value_next = torch.where(beyond, value, at_following(value_now, batch.mask))
    rewards = token_rewards(batch) if last == "reward" else batch.step_reward.double()
    delta = (rewards + gamma * value_next - value_now).where(batch.mask, 0.0)
    return _trained(accumulate(delta, batch.mask, gamma * row_lambda(batch, lambda_, alpha)), batch)


def value_change(
    batch: Batch, *, level: Literal["token", "step"] = "token", last: Literal["value", "reward"] = "value"
) -> Float[Tensor, "N L"]:
    """Advantage of each token: the change of the value that it caused, for rewards at the end and γ = 1.

    A_t = V(s_t') - V(s_t), with t' the next chosen token; these add up to V of the whole completion minus V(s_0)

    By steps, with V from Monte-Carlo branches: Kazemnejad et al. 2024 (VinePPO), arXiv:2410.01679.

    Args:
        level: ``step`` gives each token the change that its whole reasoning step caused. It reads the values only at
            the states before steps and at the end.
        last: what follows the last chosen token: the model's ``value`` of the whole completion, or its ``reward``.
            Taking 0 instead would punish every ending that was worth something.
    """
    value, ends = _value(batch), last_chosen(batch.mask)
    final = value if last == "value" else _scored(batch.reward.double(), batch)[:, None]
    starts = step_starts(batch) if level == "step" else batch.mask
    value_now = at_state(value, batch.mask).where(starts, 0.0)
    value_end = final.where(ends, 0.0).sum(-1, keepdim=True)
    value_next = torch.where(last_chosen(starts), value_end, at_following(value_now, starts))
    changes = (value_next - value_now).where(starts, 0.0)
    index = (starts.cumsum(-1) - 1).clamp(min=0)  # number of the step that each token belongs to
    per_step = torch.zeros_like(changes).scatter_add(-1, index, changes)
    return _trained(per_step.gather(-1, index), batch)


def static_q(batch: Batch) -> Float[Tensor, "N L"]:
    """Advantage of each token: the value of the prefix that ends with it, without a baseline.

    A_t = Q(s_t, y_t) = V(prefix that ends with y_t)

    Huang et al. 2025 (DVPO, static Q), arXiv:2502.16944. Goes with the shaper ``whiten``.
    """
    return _trained(_value(batch), batch)


def whiten(
    advantage: Float[Tensor, "N L"], batch: Batch, *, shift: bool = True, ddof: Count = 0, eps: NonNegative = 1e-8
) -> Float[Tensor, "N L"]:
    """Scales advantages to variance 1 and shifts them to mean 0, over the tokens of all scored completions.

    Mean and variance are over the chosen tokens on all ranks.

    A' = (A - mean) / sqrt(var + eps), plus mean where ``shift`` is off

    Huang et al. 2024 (N+ details of RLHF), arXiv:2403.17031.
    In place of a value model: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262.

    Args:
        shift: subtract the mean.
        ddof: 0 for the biased variance, as OpenRLHF and the reference code of RLHF take it; 1 as in verl.
    """
    counted = batch.mask & batch.trained[:, None]
    values = advantage.double().where(counted, 0.0)
    mean, variance = _moments(values, counted, batch, ddof)
    whitened = (values - mean) * torch.rsqrt(variance + eps) + (0.0 if shift else mean)
    return whitened.where(counted, 0.0).float()


def _trained(advantage: Float[Tensor, "N L"], batch: Batch) -> Float[Tensor, "N L"]:
    """Advantages in the dtype of the rewards, and 0 for every token that is not trained on."""
    return advantage.where(batch.mask & batch.trained[:, None], 0.0).to(batch.reward.dtype)


def _value(batch: Batch) -> Float[Tensor, "N L"]:
    """The critic's values in float64, 0 off the states."""
    return needed(batch, "value").double().where(batch.states, 0.0)


def _others_mean(values: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """Mean over the other valid completions of the group; the completion's own value if there are none."""
    valid = batch.trained
    counted = values.where(valid, 0.0)
    other_count = group_sum(valid.double(), batch.group) - 1
    return torch.where(other_count > 0, (group_sum(counted, batch.group) - counted) / other_count.clamp(min=1), values)


def _token_baseline(gains: Float[Tensor, "N L"], batch: Batch, length: int) -> Float[Tensor, " N"]:
    """Mean over the group's other completions of their gains' sum over ``length``; 0 if there are none."""
    valid = batch.trained
    total = seq_sum(gains, batch.mask).where(valid, 0.0)
    other_count = group_sum(valid.double(), batch.group) - 1
    return (group_sum(total, batch.group) - total) / (other_count.clamp(min=1) * length)


def _scored(reward: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """Rewards with 0 for unscored completions."""
    return reward.where(batch.scored, 0.0)


def _baseline(
    reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], batch: Batch, center: Center
) -> Float[Tensor, " N"] | float:
    """Baseline of each completion's reward, of the kind that ``outcome`` describes."""
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
    """Standard deviation that the rewards are divided by, of the group or of the batch."""
    match scale:
        case "group":
            return group_std(reward, batch.group, valid, ddof)
        case "batch":
            return _moments(reward, valid, batch, ddof)[1].sqrt()
    raise ValueError(f"outcome: scale must be one of {', '.join(get_args(Scale))}, not {scale!r}")


def _greedy_baseline(reward: Float[Tensor, " N"], batch: Batch) -> Float[Tensor, " N"]:
    """Reward of the group's greedy completion; the completion's own reward (advantage 0) if that one is unscored."""
    if batch.trained.any() and not batch.baseline_only.any():
        raise ValueError("outcome: center is greedy, but the rollout made no greedy completions")
    scored_greedy = batch.baseline_only & batch.scored
    has_greedy = group_sum(scored_greedy.double(), batch.group) > 0
    return torch.where(has_greedy, group_mean(reward, batch.group, scored_greedy), reward)


def _moments(values: Tensor, counted: Tensor, batch: Batch, ddof: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance of the counted values on all ranks, in two passes; 0 where too few are counted."""
    count = batch.total(counted)
    mean = batch.total(values.where(counted, 0.0)) / count.clamp(min=1)
    squares = batch.total((values - mean).where(counted, 0.0).square())
    return mean, squares / (count - ddof).clamp(min=1)
