"""KL divergence from samples, and the expected best of n samples: estimators that tests compare decoders with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def tilted_kl(
    logp: Float[Tensor, " N"], logp0: Float[Tensor, " N"], reward: Float[Tensor, " N"], *, beta: float, log_z: float
) -> Float[Tensor, ""]:
    """KL(q ‖ σ) = E_q[log q - log p0 - r / β] + log Z, from samples of q, with σ(y) = p0(y) exp(r(y) / β) / Z.

    With an upper bound of log Z it is an upper bound. Zhao et al. 2024, arXiv:2404.17546.

    Args:
        logp: log q of each sample.
        logp0: log p0 of each sample.
    """
    return (logp - logp0 - reward / beta).mean() + log_z


def expected_best(rewards: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """E[max of n] for n = 1 .. N, without bias, from N samples: Σ_i C(i-1, n-1) / C(N, n) r_(i), r ascending."""
    ascending, total = rewards.double().sort().values, len(rewards)
    rank = torch.arange(1, total + 1, dtype=torch.float64)
    means = []
    for n in range(1, total + 1):
        log_share = _log_choose(rank - 1, n - 1) - _log_choose(torch.tensor(float(total)), n)
        means.append((log_share.exp() * ascending).where(rank >= n, 0.0).sum())
    return torch.stack(means)


def _log_choose(among: Float[Tensor, "*S"], count: int) -> Float[Tensor, "*S"]:
    among = among.double()
    number = torch.tensor(float(count)).double()
    return torch.lgamma(among + 1) - torch.lgamma(number + 1) - torch.lgamma((among - number).clamp(min=0) + 1)
