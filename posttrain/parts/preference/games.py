"""Preferences as a game: labels from a table of pairwise probabilities ``[..., K, K]``, [i, j] = P(i beats j)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, broadcast
from posttrain.parts.preference.groups import labelled


def antisymmetric(table: Float[Tensor, "*G K K"]) -> Float[Tensor, "*G K K"]:
    """Both orders of a judge made one: P(i, j) + P(j, i) = 1, and ½ for a completion against itself.

    P'(i, j) = (P(i, j) + 1 - P(j, i)) / 2
    """
    return (table + 1 - table.transpose(-1, -2)) / 2


def win_rate(batch: Batch) -> Float[Tensor, "N L"]:
    """Advantage: how often a completion beats another one of its group, less ½, at each of its tokens.

    A_i = mean_{j ≠ i} P(i, j) - ½, with P(i, j) = 1 for the higher reward, ½ for equal ones, 0 for the lower

    Swamy et al. 2024 (SPO), algorithm 1, arXiv:2401.04056. The mean over a group is 0. A completion without another one
    to compare with has no advantage.
    """
    valid = labelled(batch)
    together = (batch.group[:, None] == batch.group) & valid[:, None] & valid
    together = together & ~torch.eye(len(batch), dtype=torch.bool, device=together.device)
    ahead = (batch.reward[:, None] - batch.reward).sign().where(together, 0.0)
    return broadcast(0.5 * ahead.sum(1) / together.sum(1).clamp(min=1), batch.mask)


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
