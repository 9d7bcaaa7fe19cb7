"""KL divergences of decoders from their base distribution, in nats: exact values, bounds, estimates."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def next_token_kl(logp: Float[Tensor, "*S V"], logp0: Float[Tensor, "*S V"]) -> Float[Tensor, "*S"]:
    """KL(π ‖ p0) = Σ_a π(a) (log π(a) - log p0(a)) of the distributions of one step; tokens with π = 0 add nothing.

    Summed along completions drawn from π its mean is the sequence KL (chain rule), with less variance than the
    log-ratio of the sampled tokens: the sampled token is averaged over.
    """
    possible = logp > -torch.inf
    return (logp.exp() * (logp - logp0).where(possible, 0.0)).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound KL(best of n ‖ base) <= log n - (n - 1) / n for any ranking; equality for rewards without ties.

    Beirami et al. 2024, arXiv:2401.01879. It holds for any rule that picks one of n samples, soft best-of-n and votes
    among them: whatever the rule, the picked one is in a set A with probability at most 1 - (1 - p0(A))^n. Best of n by
    a reward without ties reaches that for every p0(A), so that no rule is easier to tell from the base distribution.
    """
    return math.log(n) - (n - 1) / n


def blockwise_kl_bound(n: int, blocks: float) -> float:
    """Upper bound of the KL of best-of-n blocks: (log n - (n - 1) / n) · E[number of blocks]; loose for short blocks.

    Mudgal et al. 2023, arXiv:2310.17022.
    """
    return best_of_n_kl_bound(n) * blocks


def weighted_kl_bound(potential: float, log_z: float) -> float:
    """log ψ(y) - log Ẑ of a completion y drawn by weight from particles; its mean is an upper bound of KL(SMC ‖ base).

    The particles and the draw together have probability p0(y) ψ(y) / Ẑ times that of the other particles given that y
    is one of them (conditional SMC, Andrieu et al. 2010). KL(SMC ‖ p0) is at most the divergence of this joint
    distribution from p0(y) times the same, and that is E[log ψ(y) - log Ẑ]. With many particles it becomes
    KL(σ ‖ p0), σ = p0 ψ / Z.
    """
    return potential - log_z
