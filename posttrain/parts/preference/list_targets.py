"""Targets of lists ``(label, valid) -> [G, K]``: log-probabilities over each list; -inf for a probability of 0."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.option_types import BelowHalf, Positive


def softmax(
    label: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"], *, temperature: Positive = 1.0
) -> Float[Tensor, "G K"]:
    """Softmax of the labels: better completions get higher probabilities.

    q_k = exp(r_k / temperature) / Σ_j exp(r_j / temperature)

    Chen et al. 2024 (InfoNCA, NCA), arXiv:2402.05369.
    """
    return (label / temperature).masked_fill(~valid, -math.inf).log_softmax(-1)


def best(label: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"], *, eps: BelowHalf = 0.0) -> Float[Tensor, "G K"]:
    """Probability 1 - eps on the best completions, and eps divided among all others.

    q_k = 1 - eps for the best, eps / (K - 1) for the others

    Ji et al. 2024 (EXO), arXiv:2402.00856, with ``eps`` 0.001.
    """
    top = valid & (label == label.masked_fill(~valid, -math.inf).amax(-1, keepdim=True))
    below = valid & ~top
    rest = eps * below.any(-1, keepdim=True).to(label.dtype)
    high = (1 - rest) / top.sum(-1, keepdim=True)
    low = rest / below.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(top, high, low.where(below, 0.0)).log()
