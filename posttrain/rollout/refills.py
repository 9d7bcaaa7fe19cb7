"""Refills: which prompts of a step are kept, and how many further ones are drawn until enough are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from posttrain.batch import Batch
from posttrain.recipe.part import Part
from posttrain.system.processes import Processes


def prompts_to_draw(asked: int, kept: int, drawn: int, most: int) -> int:
    """Number of prompts of the next round, from the share of prompts that were kept so far.

    The first round draws ``asked`` prompts. With ``rate = (kept + 1) / (drawn + 2)`` (Laplace's rule of succession), a
    further round draws the smallest n that is expected to fill the step, one standard deviation of the binomial
    distribution included: n rate - sqrt(n rate (1 - rate)) >= asked - kept. A round never draws more than all rounds
    before it together, because the rate is uncertain at first.

    Args:
        asked: prompts of a step.
        kept: prompts that were kept so far, on all ranks.
        drawn: prompts that were drawn so far, on all ranks.
        most: limit of the prompts drawn in a step.

    Returns:
        0 if enough are kept or the limit is reached.
    """
    missing = asked - kept
    if missing <= 0 or not drawn:
        return max(0, min(missing, most))
    rate = (kept + 1) / (drawn + 2)
    root = (math.sqrt(1 - rate) + math.sqrt(1 - rate + 4 * missing)) / 2  # of n * rate
    return max(0, min(math.ceil(root**2 / rate), drawn, most - drawn))


def selected(parts: Sequence[Part], batch: Batch) -> Bool[Tensor, " N"]:
    """True for the completions that all parts select."""
    chosen = torch.ones(len(batch), dtype=torch.bool)
    for part in parts:
        chosen &= part(batch)
    return chosen


def first_groups(
    group: Int[Tensor, " N"], chosen: Bool[Tensor, " N"], limit: int, processes: Processes
) -> tuple[Bool[Tensor, " N"], int]:
    """Narrows ``chosen`` to the first ``limit`` groups, counted over all ranks, that have a chosen completion.

    Groups are numbered over all ranks in the order of drawing, so the groups that are kept do not depend on the number
    of processes.

    Returns:
        The narrowed mask, and the number of groups that are left on all ranks together.
    """
    own = group[chosen].unique().tolist()
    first = sorted(number for numbers in processes.gather(own) for number in numbers)[:limit]
    return chosen & torch.isin(group, torch.tensor(first, dtype=group.dtype)), len(first)
