"""Pairs and lists in a batch, read from ``batch.group`` and ``batch.reward``; a group's rows may be in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch import Author, Batch, Outputs, group_sum

Selection = Literal["all", "extremes"]
Ties = Literal["drop", "keep"]
Rows = Literal["best", "worst", "labelled", "unlabelled", "opponent"]


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of a batch: row numbers of the better and the worse completion, and the scores of all rows."""

    outputs: Outputs
    batch: Batch
    score: Float[Tensor, " N"]  # score of each completion times beta
    chosen: Int[Tensor, " P"]  # row of the better completion
    rejected: Int[Tensor, " P"]  # row of the worse completion
    beta: float = 1.0

    def both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Splits numbers of all completions ``[N]`` into those of the chosen and of the rejected ones, each ``[P]``."""
        return values[self.chosen], values[self.rejected]

    @property
    def margin(self) -> Float[Tensor, " P"]:
        """Score of the chosen completion minus that of the rejected one, times beta."""
        chosen, rejected = self.both(self.score)
        return chosen - rejected


class Lists(NamedTuple):
    """Groups as the rows of a table with a column for each completion."""

    index: Int[Tensor, "G K"]  # row of the completion in the batch; 0 where the list is shorter
    valid: Bool[Tensor, "G K"]  # True where there is a completion

    def table(self, values: Float[Tensor, " N"]) -> Float[Tensor, "G K"]:
        """Arranges numbers of the completions as a table, with 0 where a list is shorter than the longest."""
        return values[self.index].where(self.valid, 0.0)


def present(batch: Batch) -> Bool[Tensor, " N"]:
    """Completions that hold a token to train on."""
    return batch.mask.any(-1) & ~batch.baseline_only


def labelled(batch: Batch) -> Bool[Tensor, " N"]:
    """Completions that can be compared: they hold a token and have a label."""
    return present(batch) & batch.scored


def find_pairs(
    batch: Batch, *, select: Selection = "all", ties: Ties = "drop"
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Rows of the better and of the worse completion of each pair within a group.

    Args:
        select: every pair of a group, or only its best completions against its worst.
        ties: ``keep`` makes pairs of completions with equal labels too, with the earlier row as the chosen one.
    """
    valid, label = labelled(batch), batch.reward
    together = (batch.group[:, None] == batch.group) & valid[:, None] & valid
    beats = together & (label[:, None] > label)
    ahead = beats | (together & (label[:, None] == label)).triu(1) if ties == "keep" else beats
    if select == "extremes":
        ahead = ahead & ~beats.any(0)[:, None] & ~beats.any(1)
    chosen, rejected = ahead.nonzero().unbind(-1)
    return chosen, rejected


def find_lists(batch: Batch) -> Lists:
    """Groups with at least two labelled completions, as lists."""
    rows = labelled(batch).nonzero().squeeze(-1)
    _, group, size = batch.group[rows].unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    start = size.cumsum(0) - size
    column = torch.arange(len(rows), device=rows.device) - start[group[order]]
    index = rows.new_full((len(size), int(size.max()) if len(size) else 1), -1)
    index[group[order], column] = rows[order]
    index = index[size > 1]
    return Lists(index.clamp(min=0), index >= 0)


def rows_of(batch: Batch, rows: Rows) -> Bool[Tensor, " N"]:
    """Completions of a kind, as a mask.

    ``best`` and ``worst`` are the best and the worst labelled completions of each group; in a pair the best is the
    chosen one, and a completion alone in its group is both. ``labelled`` and ``unlabelled`` are completions with and
    without a label, ``opponent`` the opponent's completions.
    """
    if rows == "unlabelled":
        return present(batch) & ~batch.scored
    if rows == "opponent":
        return present(batch) & batch.by(Author.OPPONENT)
    valid = labelled(batch)
    if rows == "labelled":
        return valid
    together = (batch.group[:, None] == batch.group) & valid
    better = batch.reward > batch.reward[:, None]  # [i, j]: j is better than i
    return valid & ~(together & (better if rows == "best" else better.T)).any(1)


def share(batch: Batch, counted: Bool[Tensor, " N"], within: Int[Tensor, " N"] | None = None) -> Float[Tensor, " N"]:
    """1 over the number of counted completions of the group (or of the partition ``within``); 0 for uncounted ones."""
    count = group_sum(counted.to(batch.reward.dtype), batch.group if within is None else within)
    return (1 / count.clamp(min=1)).where(counted, 0.0)


def at_first_token(values: Float[Tensor, " N"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Puts each completion's number at its first chosen token, and 0 elsewhere."""
    first = mask & (mask.cumsum(-1) == 1)
    return values[:, None].where(first, 0.0)


def column(batch: Batch, rows: Sequence[int], name: str) -> Float[Tensor, " P"]:
    """A column of numbers of the dataset, for some rows of the batch.

    Raises:
        ValueError: if the column is missing or holds anything but numbers.
    """
    numbers = [_number(batch.rows[row], name) for row in rows]
    return torch.tensor(numbers, dtype=batch.reward.dtype, device=batch.reward.device)


def _number(row: dict[str, Any], name: str) -> float:
    """Number in a row's column."""
    if name not in row:
        raise ValueError(f"the data has no column {name!r}, which a part of the loss reads; it has {sorted(row)}")
    if isinstance(row[name], bool) or not isinstance(row[name], int | float):
        raise ValueError(f"column {name!r} should hold numbers, but holds {row[name]!r}")
    return float(row[name])
