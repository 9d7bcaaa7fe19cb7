"""Links of lists ``(score, log_target, valid) -> [G]``: the loss of all completions of a prompt together.

Notation: z_k = beta s_k; q_k is the target probability; P = softmax(z) is the policy's distribution over the list.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def cross_entropy(
    score: Float[Tensor, "G K"], log_target: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"]
) -> Float[Tensor, " G"]:
    """Cross entropy of the target and the policy's distribution over the list.

    loss = -Σ_k q_k log P_k

    Chen et al. 2024 (InfoNCA), arXiv:2402.05369. On pairs with ``best`` it is DPO's loss.
    """
    return -(log_target.exp() * _log_softmax(score, valid)).sum(-1)


def noise_contrastive(
    score: Float[Tensor, "G K"], log_target: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"]
) -> Float[Tensor, " G"]:
    """Noise-contrastive loss: classifies samples as the target's or the reference's, so absolute scores count too.

    loss = -Σ_k (q_k log σ(z_k) + log σ(-z_k) / K)

    Chen et al. 2024 (NCA), arXiv:2402.05369.
    """
    noise = valid.to(score.dtype) / valid.sum(-1, keepdim=True)
    return -(log_target.exp() * logsigmoid(score) + noise * logsigmoid(-score)).sum(-1)


def reverse_kl(
    score: Float[Tensor, "G K"], log_target: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"]
) -> Float[Tensor, " G"]:
    """Reverse (mode-seeking) KL divergence of the policy's distribution over the list from the target.

    loss = Σ_k P_k (log P_k - log q_k)

    Ji et al. 2024 (EXO), eq. 16 for pairs, arXiv:2402.00856.

    Raises:
        ValueError: if the target has a probability of 0.
    """
    if bool(((log_target == -math.inf) & valid).any()):
        raise ValueError("reverse_kl is infinite where a target probability is 0: give the target best an `eps`")
    log_policy = _log_softmax(score, valid)
    difference = (log_policy - log_target.where(valid, 0.0)).where(valid, 0.0)
    return (log_policy.exp() * difference).sum(-1)


def plackett_luce(
    score: Float[Tensor, "G K"], log_target: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"]
) -> Float[Tensor, " G"]:
    """Negative log-likelihood of the whole ranking: first the best of all, then the best of the rest, and so on.

    loss = -Σ_k log(exp(z_(k)) / Σ_{j ≥ k} exp(z_(j))), with (1) the most probable of the target

    Rafailov et al. 2023 (DPO), appendix A.3, arXiv:2305.18290. Equal ones are ranked in the order of the list.
    """
    ranking = log_target.masked_fill(~valid, -math.inf)
    order = torch.sort(ranking, dim=-1, descending=True, stable=True).indices
    ranked, ranked_valid = score.gather(-1, order), valid.gather(-1, order)
    filled = torch.where(ranked_valid, ranked, _LOWEST)
    rest = filled.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - ranked).where(ranked_valid, 0.0).sum(-1)


_LOWEST = -1e9  # in place of -inf, whose gradient is NaN


def _log_softmax(score: Tensor, valid: Tensor) -> Tensor:
    """Log-softmax over the completions that a list holds."""
    return torch.where(valid, score, _LOWEST).log_softmax(-1)
