"""Targets of a value model ``batch -> [N, L]``: the number it learns at each state, float32, NaN for no target.

A state is a prefix that ends right before a chosen token, or with one (``Batch.states``). At a column that a chosen
token follows, the target is the return from that token on. At the last chosen token's column it is the completion's
outcome, which a guide needs and a critic never reads. Unscored completions and baselines (``batch.baseline_only``) have
no targets.

Values come in kinds: ``mean`` is the expected reward under the policy that sampled, ``soft`` is
β log E exp(reward / β), ``max`` the best reward that can be reached, ``greedy`` the reward after the most probable
tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, broadcast
from posttrain.option_types import Fraction, NonNegative, Positive, facts
from posttrain.parts.credit import (
    Truncated,
    accumulate,
    at_following,
    at_state,
    following,
    last_chosen,
    open_ended,
    row_lambda,
    step_ends,
    token_rewards,
)
from posttrain.parts.ratio import log_ratio, needed

Backup = Literal["mean", "soft", "max", "greedy"]
Reduction = Literal["mean", "min", "max", "mean_minus_std"]


def backup(
    values: Float[Tensor, "*S C"], logp: Float[Tensor, "*S C"], *, kind: Backup, beta: Positive = 1.0
) -> Float[Tensor, "*S"]:
    """Value of each state from the known values of its C next states, one for each next token.

    mean: Σ_z p(z) v_z;  soft: β log Σ_z p(z) exp(v_z / β);  max: max_z v_z over p(z) > 0;  greedy: v at argmax_z p(z)

    mean: Mudgal et al. 2023 (CD-Q), arXiv:2310.17022.
    soft: Zhao et al. 2024 (twisted SMC, soft Bellman equation), arXiv:2404.17546.
    max: Wang et al. 2024 (Q*), arXiv:2406.14283.
    greedy: Yu et al. 2023 (B-Coder), arXiv:2310.03173.

    Args:
        values: value of each next token; those of probability 0 are ignored, NaN and infinities included.
        logp: log-probs of the next tokens, normalised; -inf for tokens that cannot follow.
        beta: temperature of ``soft``, in units of reward.
    """
    possible = logp > -torch.inf
    match kind:
        case "mean":
            return (logp.exp() * values.where(possible, 0.0)).sum(-1)
        case "soft":
            return beta * torch.logsumexp((logp + values / beta).where(possible, -torch.inf), -1)
        case "max":
            return values.where(possible, -torch.inf).amax(-1)
        case "greedy":
            return values.gather(-1, logp.argmax(-1, keepdim=True)).squeeze(-1)


def lambda_return(
    batch: Batch,
    *,
    gamma: Fraction = 1.0,
    lambda_: Fraction = 1.0,
    alpha: Positive | None = None,
    backup: Backup = "mean",
    beta: Positive = 1.0,
    truncated: Truncated = "end",
) -> Float[Tensor, "N L"]:
    """Target of each state: the λ-return, a mixture of the sampled rewards and the value model's own values.

    G_t = r_t + γ ((1 - λ) V(s_t') + λ G_t'), with t' the next chosen token
    G_t = (1 - λ) B(s_t) + λ (r_t + G_t') where the model gives a value to every next token, with B their backup

    Sutton and Barto 2018, section 12.1; λ = 1 is Monte Carlo, λ = 0 one-step temporal differences.
    λ = 1 for the critic alone: Yuan et al. 2025 (VC-PPO, decoupled GAE), arXiv:2503.01491.
    λ = 0 with B: Mudgal et al. 2023 (CD-Q), arXiv:2310.17022.

    The target at a column is G of the chosen token that follows. r_t is ``step_reward``, and at the last chosen token
    ``reward`` too. The values are read only where λ < 1 or a completion is bootstrapped.

    Args:
        gamma: discount per chosen token.
        alpha: λ = max(0, 1 - 1 / (α · tokens)) instead. Yue et al. 2025 (VAPO), section 4.2, arXiv:2504.05118.
        backup: kind of B, by which the loop fills ``batch.value_next``. Sampled returns estimate means, so kinds other
            than ``mean`` need λ = 0. B does not include ``step_reward``: use it with outcome rewards.
        beta: temperature of ``soft``, in units of reward.
        truncated: ``end`` treats the cut of a completion at the length limit as its ending, as most code of RLHF does.
            ``bootstrap`` takes the value at its last token in place of the rewards that would have followed; that
            token itself then has no target.

    Raises:
        ValueError: for λ > 0 with a kind other than mean, γ < 1 with B, or values that the loop did not fill.
    """
    lambdas = row_lambda(batch, lambda_, alpha)[:, None]
    sampled = lambda_ > 0 if alpha is None else True
    if backup != "mean" and sampled:
        raise ValueError(f"lambda_return: sampled returns estimate the mean, not the {backup} value; set lambda_: 0")
    rewards, cut = token_rewards(batch), open_ended(batch, truncated)
    if alpha is None and lambda_ == 1 and not bool(cut.any()):
        return _at_states(accumulate(rewards, batch.mask, gamma), batch, truncated)
    if batch.value_next is None:
        value = _state_values(batch, backup)
        following_value = torch.where(cut, value, (1 - lambdas) * at_following(at_state(value, batch.mask), batch.mask))
        terms, decay = rewards + gamma * following_value.where(batch.mask, 0.0), gamma * lambdas
    else:
        if gamma != 1:
            raise ValueError(f"lambda_return: a backup over every next token is undiscounted; gamma is {gamma}, not 1")
        value = batch.value_next.double().where(batch.states, 0.0)
        seen = rewards + value.where(cut, 0.0)
        terms, decay = (1 - lambdas) * at_state(value, batch.mask) + lambdas * seen, lambdas
    return _at_states(accumulate(terms.where(batch.mask, 0.0), batch.mask, decay.squeeze(-1)), batch, truncated)


@facts(soft_value="beta")
def soft_return(batch: Batch, *, beta: Positive = 0.5, truncated: Truncated = "end") -> Float[Tensor, "N L"]:
    """Target of each state: the rewards from it on, minus the sampling policy's KL cost from it on.

    G_t = r_t + G_t' - β (log μ(y_t) - log π_ref(y_t)), with μ the distribution that the token was drawn from

    Its mean is the soft value of μ against the reference policy. Where μ ∝ π_ref exp(V / β), with V learned from the
    previous samples, this is soft policy iteration (Haarnoja et al. 2018, arXiv:1801.01290), which for completions of
    T tokens reaches the tilted distribution π_ref exp(reward / β) / Z after T rounds. It is a third anchor for IVO, Liu
    et al. 2025, arXiv:2503.02368, and the only one that ends there. μ = π_ref gives ``lambda_return`` with λ = 1.

    Args:
        beta: temperature, in units of reward; guide with ``strength`` 1 / β.
        truncated: ``end`` treats a completion that was cut off as ended; with ``bootstrap`` such completions have no
            target, because the rewards that would have followed are unknown.
    """
    paid = beta * log_ratio(batch.logp_sampler, needed(batch, "logp_ref"), batch.mask).double()
    returns = accumulate((token_rewards(batch) - paid).where(batch.mask, 0.0), batch.mask, 1.0)
    cut = open_ended(batch, truncated).any(-1, keepdim=True)
    return _at_states(returns, batch, truncated).where(~cut, torch.nan)


def outcome_label(batch: Batch, *, at: Literal["states", "end"] = "states") -> Float[Tensor, "N L"]:
    """Target of each state: the completion's reward, whether it stopped or was cut off.

    target_t = R

    Yang and Klein 2021 (FUDGE), arXiv:2104.05218; as a squared error: Mudgal et al. 2023 (CD-FUDGE), arXiv:2310.17022.
    At the end alone: Cobbe et al. 2021 (solution-level verifiers), arXiv:2110.14168.

    Args:
        at: ``end`` labels the last chosen token alone: an outcome reward model.
    """
    where = batch.states if at == "states" else last_chosen(batch.mask)
    return _labels(batch.reward.double()[:, None].expand(batch.mask.shape), where, batch)


def step_labels(batch: Batch) -> Float[Tensor, "N L"]:
    """Process labels: ``step_reward`` at the last chosen token of each step; NaN means no label.

    Lightman et al. 2023 (PRM800K), arXiv:2305.20050.
    """
    return _labels(batch.step_reward.double(), step_ends(batch), batch)


def branch_estimate(rewards: Float[Tensor, "*S K"], *, how: Literal["mean", "any"] = "mean") -> Float[Tensor, "*S"]:
    """Value of each state from the rewards of K completions that were sampled from it; NaN where none is scored.

    mean: Σ_k r_k / K;  any: 1 if max_k r_k > 0, 0 else

    mean: Kazemnejad et al. 2024 (VinePPO), arXiv:2410.01679.
    Both, as soft and hard estimation: Wang et al. 2023 (Math-Shepherd), arXiv:2312.08935.
    """
    if how == "mean":
        return rewards.nanmean(-1)
    scored = ~rewards.isnan()
    reached = (rewards.where(scored, -torch.inf).amax(-1) > 0).to(rewards.dtype)
    return reached.where(scored.any(-1), torch.nan)


def reduce_members(
    values: Float[Tensor, " members *S"], *, how: Reduction, deviations: NonNegative = 1.0
) -> Float[Tensor, "*S"]:
    """Combines the values of an ensemble's members into one.

    mean_minus_std: mean - deviations · std, with the biased standard deviation

    min: Fujimoto et al. 2018 (clipped double Q-learning), arXiv:1802.09477.
    min and mean - deviations · variance of reward models: Coste et al. 2023, arXiv:2310.02743.
    """
    match how:
        case "mean":
            return values.mean(0)
        case "min":
            return values.amin(0)
        case "max":
            return values.amax(0)
        case "mean_minus_std":
            return values.mean(0) - deviations * values.std(0, correction=0)


def _at_states(returns: Float[Tensor, "N L"], batch: Batch, truncated: Truncated) -> Float[Tensor, "N L"]:
    """Targets at the states: the return of the chosen token that follows, and at the end the outcome if it is known."""
    ends = last_chosen(batch.mask)
    outcome = broadcast(batch.reward.double(), ends).where(~open_ended(batch, truncated), torch.nan)
    targets = torch.where(ends, outcome, at_following(returns, batch.mask))
    followed = following(batch.mask) < batch.mask.shape[1]
    return _labels(targets, batch.states & (followed | ends), batch)


def _labels(labels: Float[Tensor, "N L"], where: Tensor, batch: Batch) -> Float[Tensor, "N L"]:
    """Labels of the completions that are trained on, and NaN for everything else."""
    return labels.where(where & batch.trained[:, None], torch.nan).to(batch.reward.dtype)


def _state_values(batch: Batch, backup: Backup) -> Float[Tensor, "N L"]:
    """The value model's values in float64, 0 off the states."""
    if backup != "mean":
        raise ValueError(
            f"lambda_return: the backup {backup} needs a value for each next token: set `value.head.type: per_token`"
        )
    return needed(batch, "value").double().where(batch.states, 0.0)
