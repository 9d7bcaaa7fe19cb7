"""Preferences as a game: labels from a table of pairwise probabilities ``[..., K, K]``, [i, j] = P(i beats j)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def antisymmetric(table: Float[Tensor, "*G K K"]) -> Float[Tensor, "*G K K"]:
    """Both orders of a judge made one: P(i, j) + P(j, i) = 1, and ½ for a completion against itself.

    P'(i, j) = (P(i, j) + 1 - P(j, i)) / 2
    """
    return (table + 1 - table.transpose(-1, -2)) / 2


def win_rates(table: Float[Tensor, "*G K K"]) -> Float[Tensor, "*G K"]:
    """How often each completion beats another one of its group; the mean over a group is ½.

    r_i = mean_{j ≠ i} P(i, j)

    Swamy et al. 2024 (SPO), algorithm 1, arXiv:2401.04056; as a reward of GRPO it needs no baseline but ½.

    Raises:
        ValueError: for a group of one.
    """
    size = table.shape[-1]
    if size < 2:
        raise ValueError("win_rates: a completion alone in its group has nothing to win against")
    others = ~torch.eye(size, dtype=torch.bool, device=table.device)
    return table.where(others, 0.0).sum(-1) / (size - 1)
