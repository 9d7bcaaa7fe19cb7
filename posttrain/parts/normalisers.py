"""Normalisers ``batch -> [N, L]``: each token's share of the loss, from sums over the global batch.

The shares are float32 and zero off the mask; the loss of a term is the plain sum of ``term * share``. The counts below
are over every rank and every micro-batch (``batch.total``), so the loss does not depend on how the batch is split.
Unscored completions count: their advantage is 0, but other terms (KL, entropy) are about them too. Completions without
a chosen token, and baselines (``batch.baseline_only``), do not count.

Notation: N completions; G groups; o_i are the chosen tokens of completion i, |o_i| of them; m is the mask.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.option_types import PositiveCount


def token_mean(batch: Batch, *, of: Literal["all", "positive"] = "all") -> Float[Tensor, "N L"]:
    """Mean over all chosen tokens: long completions weigh more.

    w_it = m_it / Σ_j |o_j|

    Yu et al. 2025 (DAPO), eq. 12, arXiv:2503.14476.

    Args:
        of: ``positive`` counts only completions with a positive score, for a term that is about them alone.
            Yue et al. 2025 (VAPO), section 4.3, arXiv:2504.05118.
    """
    mask = _counted(batch)
    if of == "positive":
        mask = mask & (batch.score > 0)[:, None]
    return _float(mask) / batch.total(mask).clamp(min=1)


def seq_mean_of_token_mean(batch: Batch) -> Float[Tensor, "N L"]:
    """Mean over completions of the mean over their tokens: every completion weighs the same.

    w_it = m_it / (N |o_i|)

    Shao et al. 2024 (GRPO), eq. 3, arXiv:2402.03300.
    """
    mask = _counted(batch)
    return _float(mask) / mask.sum(-1, keepdim=True).clamp(min=1) / _sequences(batch, mask)


def seq_mean_of_token_sum(batch: Batch) -> Float[Tensor, "N L"]:
    """Mean over completions of the sum over their tokens: the policy gradient of whole completions.

    w_it = m_it / N

    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """
    mask = _counted(batch)
    return _float(mask) / _sequences(batch, mask)


def seq_sum_over(batch: Batch, *, length: PositiveCount) -> Float[Tensor, "N L"]:
    """Mean over completions of the sum over their tokens, divided by a constant number of tokens.

    w_it = m_it / (N · length)

    Liu et al. 2025 (Dr. GRPO), section 3, arXiv:2503.20783.

    The constant, usually the longest completion that can be sampled, only keeps the size of the gradient near that of
    a mean.

    Raises:
        ValueError: if ``length`` is not positive.
    """
    if length <= 0:
        raise ValueError(f"seq_sum_over: length is a number of tokens and must be positive, not {length}")
    return seq_mean_of_token_sum(batch) / length


def group_mean_of_token_sum(batch: Batch) -> Float[Tensor, "N L"]:
    """Mean over groups of the sum over the tokens of all their completions; with preference data, mean over pairs.

    w_it = m_it / G, with G the groups that hold a chosen token

    Rafailov et al. 2023 (DPO), eq. 7, arXiv:2305.18290.

    Groups must not straddle ranks.
    """
    mask = _counted(batch)
    groups = batch.group[mask.any(-1)].unique()
    return _float(mask) / batch.total(torch.ones_like(groups)).clamp(min=1)


def token_sum(batch: Batch) -> Float[Tensor, "N L"]:
    """Plain sum over all chosen tokens.

    w_it = m_it
    """
    return _float(_counted(batch))


def _counted(batch: Batch) -> Bool[Tensor, "N L"]:
    """Tokens that have a share: chosen, and not of a baseline."""
    return batch.mask & ~batch.baseline_only[:, None]


def _sequences(batch: Batch, mask: Bool[Tensor, "N L"]) -> Tensor:
    """Number of completions on all ranks that hold a chosen token, at least 1."""
    return batch.total(mask.any(-1)).clamp(min=1)


def _float(mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    return mask.to(torch.float32)
