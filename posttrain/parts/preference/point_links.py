"""Links of single completions ``(score, label) -> [N]``: the loss of a completion.

Notation: z = beta (s - b) is the score minus the baseline; desirable means a label above 0. Labels of pairs are 1 and
0, so their chosen completion is desirable and their rejected one is not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.option_types import Fraction, NonNegative


def sigmoid(
    score: Float[Tensor, " N"],
    label: Float[Tensor, " N"],
    *,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Float[Tensor, " N"]:
    """Sigmoid loss, which saturates: completions with very low or very high scores hardly count.

    loss = λ_D (1 - σ(z)) if desirable, λ_U (1 - σ(-z)) else

    Ethayarajh et al. 2024 (KTO), eq. 7, arXiv:2402.01306, with the baseline ``mismatched``.
    Without a baseline: D'Oosterlinck et al. 2024 (APO-zero), eq. 7, arXiv:2408.06266.
    """
    good = label > 0
    weight = torch.full_like(score, desirable).where(good, undesirable)
    return weight * torch.where(good, -score, score).sigmoid()


def sigmoid_down(score: Float[Tensor, " N"], label: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Makes desirable completions less likely: for chosen completions that are worse than the policy's own.

    loss = σ(z) if desirable, 0 else

    The first part of D'Oosterlinck et al. 2024 (APO-down), eq. 8, arXiv:2408.06266.
    """
    return score.sigmoid().where(label > 0, 0.0)


def logistic(
    score: Float[Tensor, " N"],
    label: Float[Tensor, " N"],
    *,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Float[Tensor, " N"]:
    """Negative log-likelihood of a classifier of desirable completions.

    loss = -λ_D log σ(z) if desirable, -λ_U log σ(-z) else

    Jung et al. 2024 (BCO), arXiv:2404.04656, with the baseline ``running_mean``.
    """
    good = label > 0
    weight = torch.full_like(score, desirable).where(good, undesirable)
    return -weight * logsigmoid(torch.where(good, score, -score))


def square(
    score: Float[Tensor, " N"], label: Float[Tensor, " N"], *, scale: float = 1.0, center: float = 0.5
) -> Float[Tensor, " N"]:
    """Squared distance of the score from a multiple of the label.

    loss = (z - scale (label - center))²

    Wu et al. 2024 (SPPO), eq. 4.7, arXiv:2405.00675, with ``beta: 1``, ``scale`` η and win rates as labels; on pairs
    with labels 1 and 0, the hard form. Added to the logistic loss: Xiao et al. 2024 (Cal-DPO), arXiv:2412.14516.
    With ``scale: 0``: a penalty on large scores.
    """
    return (score - scale * (label - center)).square()


def linear(score: Float[Tensor, " N"], label: Float[Tensor, " N"], *, alpha: Fraction = 0.5) -> Float[Tensor, " N"]:
    """Linear loss: raises desirable completions and lowers all others; it is bounded only together with a KL term.

    loss = -α z if desirable, (1 - α) z else

    Abdolmaleki et al. 2024 (PMPO), arXiv:2410.04166, with ``beta: 1`` and the score ``log_prob``.
    """
    return torch.where(label > 0, -alpha * score, (1 - alpha) * score)
