"""Cuts batches into micro-batches of bounded size that hold rows of similar length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.batch import OPTIONAL_FIELDS, Batch


def length_groups(length: Int[Tensor, " N"], tokens: int, together: Int[Tensor, " N"] | None = None) -> list[list[int]]:
    """Splits rows, sorted by length, into groups of at most ``tokens`` padded tokens; a longer row is a group alone.

    Sorting keeps padding low when lengths differ.

    Args:
        together: a number for each row; rows with equal numbers stay in one group.
    """
    lengths = length.tolist()
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(range(len(lengths)) if together is None else together.tolist()):
        units.setdefault(unit, []).append(row)
    longest = {unit: max(lengths[row] for row in rows) for unit, rows in units.items()}
    groups: list[list[int]] = []
    for unit in sorted(units, key=longest.__getitem__):  # ascending: the unit that joins a group is its longest
        if groups and longest[unit] * (len(groups[-1]) + len(units[unit])) <= tokens:
            groups[-1] += units[unit]
        else:
            groups.append(list(units[unit]))
    return groups


def micro_batches(
    batch: Batch, tokens: int, all_max: Callable[[int], int], *, whole_groups: bool = False
) -> list[Batch]:
    """Cuts a batch into micro-batches of at most ``tokens`` padded tokens, the same number of them on every rank.

    A rank with fewer splits its largest ones, and then adds blank rows: collective operations need every rank.

    Args:
        all_max: function that gives the largest of all ranks' numbers.
        whole_groups: keeps the completions of a prompt in one micro-batch, even if it exceeds ``tokens``.
    """
    groups = length_groups(batch.length, tokens, batch.group if whole_groups else None)
    count = all_max(len(groups))
    while not whole_groups and len(groups) < count and max(map(len, groups)) > 1:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        rows = groups[largest]
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    batches = [batch[rows].trim() for rows in groups]
    return batches + [blank_row(batches[0])] * (count - len(batches))


def blank_row(batch: Batch) -> Batch:
    """The first completion without any token to train on, for a rank that has no rows left but must take part."""
    row = batch[[0]]
    changes: dict[str, Any] = {"mask": torch.zeros_like(row.mask), "step_id": torch.full_like(row.step_id, -1)}
    for name in ("score", "reward"):
        changes[name] = torch.full_like(row.reward, float("nan"))
    if row.rewards is not None:
        changes["rewards"] = torch.full_like(row.rewards, float("nan"))
    for name in ("logp_sampler", "step_reward", "term_share", *OPTIONAL_FIELDS):
        if getattr(row, name) is not None:
            changes[name] = torch.zeros_like(getattr(row, name))
    return row.set(**changes)
