"""Scores ``(outputs, batch) -> [N]``: how much the policy prefers a completion; beta belongs to the loss term.

Notation: l_t = log π(y_t) - log π_ref(y_t); s = Σ_t l_t is the log-ratio of a completion. Every score with a reference
is exactly 0 if the policy equals the reference.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.batch import Batch, Outputs, seq_mean
from posttrain.option_types import Fraction
from posttrain.parts.preference.groups import labelled
from posttrain.parts.ratio import needed

Level = Literal["sum", "mean"]
Divergence = Literal["forward_kl", "jensen_shannon", "alpha", "chi_squared"]
MAX_EXPONENT = 80.0  # e^80 is still a float32; whole completions have log-ratios of hundreds


def log_ratio(
    outputs: Outputs,
    batch: Batch,
    *,
    level: Level = "sum",
    tail: Fraction = 1.0,
    discount: Fraction = 1.0,
    previous: Fraction = 0.0,
) -> Float[Tensor, " N"]:
    """Log-ratio of a completion's probabilities under the policy and the reference.

    score = Σ_t m_t l_t, or Σ_t m_t l_t / Σ_t m_t

    Rafailov et al. 2023 (DPO), eq. 5, arXiv:2305.18290.

    Args:
        level: ``mean`` is over the completion's tokens. Lambert et al. 2024 (Tülu 3, length-normalised DPO),
            arXiv:2411.15124.
        tail: m_t of tokens beyond the length of the group's shortest completion. Liu et al. 2024 (LD-DPO),
            arXiv:2409.06411.
        discount: m_t = discount^t, with t counted from 0 over the chosen tokens. Shao et al. 2025 (D²PO),
            arXiv:2502.14340; Hejna et al. 2023 (CPL), arXiv:2310.13639.
        previous: share of the policy before the update in log π_ref, a geometric mixture of that policy and the
            reference. Gao et al. 2024 (REBEL), arXiv:2404.16767, use 1.
    """
    ratio = (outputs.logp - _reference(batch, previous)).where(batch.mask, 0.0)
    return _reduce(ratio, batch, level, tail, discount)


def log_prob(
    outputs: Outputs, batch: Batch, *, level: Level = "sum", tail: Fraction = 1.0, discount: Fraction = 1.0
) -> Float[Tensor, " N"]:
    """Log-probability of a completion under the policy, without a reference; options as in ``log_ratio``.

    score = Σ_t m_t log π(y_t), or Σ_t m_t log π(y_t) / Σ_t m_t

    Sum: Xu et al. 2024 (CPO), eq. 3, arXiv:2401.08417. Mean: Meng et al. 2024 (SimPO), eq. 4, arXiv:2405.14734.
    """
    return _reduce(outputs.logp.where(batch.mask, 0.0), batch, level, tail, discount)


def f_divergence(
    outputs: Outputs, batch: Batch, *, divergence: Divergence = "jensen_shannon", alpha: float = 0.5
) -> Float[Tensor, " N"]:
    """Derivative of an f-divergence at the ratio of policy and reference, in place of its logarithm.

    With z = e^s: forward_kl: 1 - 1/z; jensen_shannon: log(2z / (1 + z)); alpha: (1 - z^-α) / α;
    chi_squared: z - 1 + log z

    Wang et al. 2023 (f-DPO), arXiv:2309.16240. chi_squared, with a KL part: Huang et al. 2024 (χPO),
    arXiv:2407.13399. Constants make a score of 0 at the reference; they cancel in a pair. Exponents are cut at 80.

    Args:
        alpha: α of the paper; 1 is ``forward_kl``, and towards 0 it becomes ``log_ratio``.

    Raises:
        ValueError: if ``alpha`` is 0.
    """
    s = log_ratio(outputs, batch)
    if divergence == "jensen_shannon":
        return math.log(2) + logsigmoid(s)
    if divergence == "chi_squared":
        return torch.expm1(s.clamp(max=MAX_EXPONENT)) + s
    power = -1.0 if divergence == "forward_kl" else -alpha
    if power == 0:
        raise ValueError("f_divergence: the limit of alpha = 0 is the score log_ratio; use that one")
    return torch.expm1((power * s).clamp(max=MAX_EXPONENT)) / power


def log_odds(outputs: Outputs, batch: Batch) -> Float[Tensor, " N"]:
    """Log-odds of the geometric mean p of a completion's token probabilities.

    score = log(p / (1 - p)), with log p = mean_t log π(y_t)

    Hong et al. 2024 (ORPO), eq. 4 and 7, arXiv:2403.07691.
    """
    mean = seq_mean(outputs.logp, batch.mask).clamp(max=-torch.finfo(outputs.logp.dtype).eps)  # p = 1 has no odds
    return mean - _log1m_exp(mean)


def power(outputs: Outputs, batch: Batch, *, alpha: float = 0.25) -> Float[Tensor, " N"]:
    """Power of the geometric mean p of a completion's token probabilities.

    score = (1 - p^-α) / α, with log p = mean_t log π(y_t)

    Gupta et al. 2025 (AlphaPO), arXiv:2501.03884. α towards 0 gives ``log_prob(level="mean")``.

    Raises:
        ValueError: if ``alpha`` is 0.
    """
    if alpha == 0:
        raise ValueError("power: the limit of alpha = 0 is the score log_prob with `level: mean`; use that one")
    mean = seq_mean(outputs.logp, batch.mask)
    return -torch.expm1((-alpha * mean).clamp(max=MAX_EXPONENT)) / alpha


def _reference(batch: Batch, previous: float) -> Float[Tensor, "N L"]:
    """Log-probs of the reference mixture; a policy whose share is 0 is not read, because it may never have been run."""
    if previous in (0.0, 1.0):
        return needed(batch, "logp_old" if previous else "logp_ref")
    return previous * needed(batch, "logp_old") + (1 - previous) * needed(batch, "logp_ref")


def _reduce(
    values: Float[Tensor, "N L"], batch: Batch, level: Level, tail: float, discount: float
) -> Float[Tensor, " N"]:
    """Weighted sum or mean over each completion's tokens; ``values`` are zero off the mask."""
    weight = _token_weights(batch, tail, discount).to(values.dtype)
    total = (values * weight).sum(-1)
    return total if level == "sum" else total / weight.sum(-1).where(batch.mask.any(-1), 1.0)


def _token_weights(batch: Batch, tail: float, discount: float) -> Float[Tensor, "N L"]:
    """Weight m_t of each token."""
    position = batch.mask.cumsum(-1) - 1
    weight = batch.mask.to(torch.float32)
    if discount != 1.0:
        weight = weight * discount ** position.clamp(min=0)
    if tail != 1.0:
        beyond = position >= _shortest(batch)[:, None]
        weight = weight * torch.where(beyond, tail, 1.0)
    return weight


def _shortest(batch: Batch) -> Tensor:
    """Number of tokens in the shortest labelled completion of each completion's group."""
    length = batch.tokens_chosen
    together = (batch.group[:, None] == batch.group) & labelled(batch)
    return torch.where(together, length, length.max()).amin(1)


def _log1m_exp(x: Tensor) -> Tensor:
    """Computes log(1 - e^x) for x < 0, without cancellation on either side of -log 2."""
    small = x > -math.log(2)
    near = torch.where(small, x, -1.0)  # each branch sees only numbers of its own side: no NaN in the gradient
    far = torch.where(small, -1.0, x)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
