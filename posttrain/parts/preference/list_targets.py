"""Targets of lists ``(label, valid) -> [G, K]``: log-probabilities over each list; -inf where there is none."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.option_types import BelowHalf, Positive


def softmax(
    label: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"], *, temperature: Positive = 1.0
) -> Float[Tensor, "G K"]:
    """Probabilities that grow with the labels.

    q_k = exp(r_k / temperature) / Σ_j exp(r_j / temperature)

    Chen et al. 2024 (InfoNCA, NCA), arXiv:2402.05369.
    """
    return (label / temperature).masked_fill(~valid, -math.inf).log_softmax(-1)


def best(label: Float[Tensor, "G K"], valid: Bool[Tensor, "G K"], *, eps: BelowHalf = 0.0) -> Float[Tensor, "G K"]:
    """Everything on the best completions, but for a share that the others divide.

    q_k = 1 - eps for the best, eps / (K - 1) for the others

    Ji et al. 2024 (EXO), arXiv:2402.00856, with ``eps`` 0.001.
    """
    top = valid & (label == label.masked_fill(~valid, -math.inf).amax(-1, keepdim=True))
    others = valid & ~top
    spared = eps * others.any(-1, keepdim=True).to(label.dtype)
    high = (1 - spared) / top.sum(-1, keepdim=True)
    low = spared / others.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(top, high, low.where(others, 0.0)).log()
