"""Preferences as a game: what becomes of rewards where completions are compared, ``(batch) -> [N]``.

Tables of pairwise probabilities are ``[..., K, K]``, with [i, j] = P(i beats j).
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


def antisymmetric(table: Float[Tensor, "*G K K"]) -> Float[Tensor, "*G K K"]:
    """Both orders of a judge made one: P(i, j) + P(j, i) = 1, and ½ for a completion against itself.

    P'(i, j) = (P(i, j) + 1 - P(j, i)) / 2
    """
    return (table + 1 - table.transpose(-1, -2)) / 2


def rivals(batch: Batch, against: Rivals) -> Bool[Tensor, "N N"]:
    """[i, j]: completion i is compared with completion j.

    Args:
        against: the other completions of the group that are learned from, or those that are baselines alone
            (``batch.baseline_only``), such as the opponent's.
    """
    ours = labelled(batch)
    theirs = ours if against == "group" else batch.baseline_only & batch.scored & batch.mask.any(-1)
    together = (batch.group[:, None] == batch.group) & ours[:, None] & theirs
    return together & ~torch.eye(len(batch), dtype=torch.bool, device=together.device)


def mean_over_rivals(
    table: Float[Tensor, "N N"], compared: Bool[Tensor, "N N"], *, itself: bool = False
) -> Float[Tensor, " N"]:
    """How often each completion wins against those that it is compared with; ½ where there is none.

    Args:
        table: probabilities of winning; read where ``compared``.
        itself: counts a tie with itself too. The mean of a group is ½ either way.
    """
    own = 0.5 if itself else 0.0
    wins, count = table.where(compared, 0.0).sum(1) + own, compared.sum(1) + 2 * own
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
    """How often a completion beats others of its prompt, by the rewards.

    r_i = mean_j P(i, j) - ½, with P(i, j) = 1 for the higher reward, ½ for equal ones, 0 for the lower

    Swamy et al. 2024 (SPO), algorithm 1, arXiv:2401.04056, whose mean over a group is 0.

    Args:
        against: the others of the group, or the baselines, such as completions of the opponent.
        itself: counts a tie with itself. Differences of such rates are unbiased for regressions over all pairs of the
            group: two completions of which the first wins with probability p differ by p - ½.
        temperature: P(i, j) = σ((r_i - r_j) / temperature), of a Bradley-Terry model's rewards.
        center: subtracted.
    """
    gap = batch.reward[:, None] - batch.reward
    table = 0.5 + 0.5 * gap.sign() if temperature is None else (gap / temperature).sigmoid()
    return mean_over_rivals(table, rivals(batch, against), itself=itself) - center


def given_first(batch: Batch) -> Float[Tensor, " N"]:
    """The completion that the data set gives is better than all others.

    r = 1 if given, 0 else

    Chen et al. 2024 (SPIN), arXiv:2401.01335.
    """
    return batch.by(Author.GIVEN).to(batch.reward.dtype)
