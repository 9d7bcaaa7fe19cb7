"""Rewards from comparing completions with each other, ``(batch) -> [N]``: preferences as a game.

Tables of pairwise probabilities are ``[N, N]``, with [i, j] = P(i beats j).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Author, Batch
from posttrain.option_types import Positive, facts
from posttrain.parts.preference.groups import labelled

Rivals = Literal["group", "baselines"]


def rivals(batch: Batch, against: Rivals) -> Bool[Tensor, "N N"]:
    """Table of comparisons: [i, j] is True if completion i is compared with completion j.

    Args:
        against: ``group``: the group's other completions that are trained on. ``baselines``: the group's completions
            that serve as a baseline alone (``batch.baseline_only``), such as the opponent's.
    """
    ours = labelled(batch)
    theirs = ours if against == "group" else batch.baseline_only & batch.scored & batch.mask.any(-1)
    together = (batch.group[:, None] == batch.group) & ours[:, None] & theirs
    return together & ~torch.eye(len(batch), dtype=torch.bool, device=together.device)


def mean_over_rivals(
    table: Float[Tensor, "N N"], compared: Bool[Tensor, "N N"], *, itself: bool = False
) -> Float[Tensor, " N"]:
    """Mean probability that a completion wins its comparisons; ½ if it is compared with no other.

    Args:
        table: probabilities of winning; read where ``compared`` is True.
        itself: counts a tie with itself too. The mean of a group is ½ either way.
    """
    tie = 0.5 if itself else 0.0
    wins, count = table.where(compared, 0.0).sum(1) + tie, compared.sum(1) + 2 * tie
    return torch.where(compared.any(1), wins / count.clamp(min=1), 0.5)


@facts(compares_group=True)
def win_rate(
    batch: Batch,
    *,
    against: Rivals = "group",
    itself: bool = False,
    temperature: Positive | None = None,
    center: float = 0.5,
) -> Float[Tensor, " N"]:
    """Win rate of a completion against the other completions of its prompt, judged by their rewards.

    r_i = mean_j P(i, j) - ½, with P(i, j) = 1 for the higher reward, ½ for equal ones, 0 for the lower

    Swamy et al. 2024 (SPO), algorithm 1, arXiv:2401.04056, whose mean over a group is 0.

    Args:
        against: ``group``: the group's other completions. ``baselines``: its baselines, such as completions of the
            opponent.
        itself: counts a tie with itself. Differences of such rates are unbiased for regressions over all pairs of the
            group: two completions of which the first wins with probability p differ by p - ½.
        temperature: P(i, j) = σ((r_i - r_j) / temperature), for the rewards of a Bradley-Terry model.
        center: number that is subtracted from the win rate.
    """
    gap = batch.reward[:, None] - batch.reward
    table = 0.5 + 0.5 * gap.sign() if temperature is None else (gap / temperature).sigmoid()
    return mean_over_rivals(table, rivals(batch, against), itself=itself) - center


def given_first(batch: Batch) -> Float[Tensor, " N"]:
    """Reward 1 for the completion from the dataset and 0 for all others.

    r = 1 if from the dataset, 0 else

    Chen et al. 2024 (SPIN), arXiv:2401.01335.
    """
    return batch.by(Author.GIVEN).to(batch.reward.dtype)
