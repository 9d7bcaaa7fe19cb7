"""Batches cut into micro-batches of bounded size, rows of like length together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.batch import OPTIONAL_FIELDS, Batch


def length_groups(length: Int[Tensor, " N"], tokens: int, together: Int[Tensor, " N"] | None = None) -> list[list[int]]:
    """Rows sorted by length, in groups of at most ``tokens`` padded tokens; what is longer stands alone.

    Sorting keeps padding low where lengths differ.

    Args:
        together: rows of the same number here are not separated.
    """
    lengths = length.tolist()
    units: dict[int, list[int]] = {}
    for row, unit in enumerate(range(len(lengths)) if together is None else together.tolist()):
        units.setdefault(unit, []).append(row)
    longest = {unit: max(lengths[row] for row in rows) for unit, rows in units.items()}
    groups: list[list[int]] = []
    for unit in sorted(units, key=longest.__getitem__):  # ascending: what joins is the longest
        if groups and longest[unit] * (len(groups[-1]) + len(units[unit])) <= tokens:
            groups[-1] += units[unit]
        else:
            groups.append(list(units[unit]))
    return groups


def micro_batches(
    batch: Batch, tokens: int, all_max: Callable[[int], int], *, whole_groups: bool = False
) -> list[Batch]:
    """A batch in micro-batches of at most ``tokens`` padded tokens; as many of them on every rank.

    A rank with fewer splits some, and at the end adds blank rows: collective operations need every rank.

    Args:
        whole_groups: the completions of a prompt stay in one micro-batch, whatever that takes.
    """
    groups = length_groups(batch.length, tokens, batch.group if whole_groups else None)
    wanted = all_max(len(groups))
    while not whole_groups and len(groups) < wanted and max(map(len, groups)) > 1:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        rows = groups[largest]
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    made = [batch[rows].trim() for rows in groups]
    return made + [blank_row(made[0])] * (wanted - len(made))


def blank_row(batch: Batch) -> Batch:
    """The first completion with nothing in it to train on: for a rank that has no rows where all must take part."""
    row = batch[[0]]
    nothing = torch.zeros_like(row.mask)
    changes: dict[str, Any] = {"mask": nothing, "step_id": torch.full_like(row.step_id, -1)}
    for name in ("score", "reward"):
        changes[name] = torch.full_like(row.reward, float("nan"))
    for name in ("logp_sampler", "step_reward", "term_share", *OPTIONAL_FIELDS):
        if getattr(row, name) is not None:
            changes[name] = torch.zeros_like(getattr(row, name))
    return row.set(**changes)
