"""The base class of scorers that compare the completions of a prompt with each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.parts.preference.games import Rivals, mean_over_rivals, rivals
from reward_models.loading import prompts_of


class Comparer(ABC):
    """Rewards a completion by its win rate against its rivals. Each pair is judged in both orders.

    r_i = mean_j p_ij - center,  p_ij = (P(i first, i wins) + P(j first, i wins)) / 2

    So p_ij + p_ji = 1, even if the judge prefers the first place: Zheng et al. 2023, section 3.4, arXiv:2306.05685. A
    group of n completions takes n (n - 1) questions.

    Args:
        against: the rivals: all other completions of the ``group``, or only the ``baselines``, such as completions of
            the opponent.
        itself: counts a tie with itself; see :func:`posttrain.parts.preference.games.win_rate`.
        center: number that is subtracted; ½ makes the mean over a group 0.
    """

    def __init__(self, *, against: Rivals = "group", itself: bool = False, center: float = 0.0) -> None:
        self.against: Rivals = against
        self.itself, self.center = itself, center

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        """The win rate of each completion minus the center; the win rate is ½ for a completion without rivals."""
        are_rivals = rivals(batch, self.against)
        pairs = (are_rivals | are_rivals.T).triu().nonzero().tolist()
        prompts, texts = prompts_of(batch), batch.texts
        table = batch.reward.new_full(are_rivals.shape, 0.5)
        wins = self.probabilities([(prompts[i], texts[i], texts[j]) for i, j in pairs])
        for (i, j), win in zip(pairs, wins.tolist(), strict=True):
            table[i, j], table[j, i] = win, 1 - win
        return mean_over_rivals(table, are_rivals, itself=self.itself) - self.center

    def probabilities(self, pairs: Sequence[tuple[Any, str, str]]) -> Float[Tensor, " P"]:
        """Probabilities that the first of two completions is better, averaged over both orders.

        Args:
            pairs: a prompt (messages or text) and two completions each.
        """
        if not pairs:
            return torch.empty(0)
        orders = [(prompt, *order) for prompt, a, b in pairs for order in ((a, b), (b, a))]
        first = self.first_wins(orders).view(-1, 2)
        return (first[:, 0] + 1 - first[:, 1]) / 2

    @abstractmethod
    def first_wins(self, ordered: Sequence[tuple[Any, str, str]]) -> Float[Tensor, " Q"]:
        """Probabilities that the first completion is better, judged in this order only.

        Args:
            ordered: a prompt (messages or text) and two completions each.
        """
