"""Which completions stay: ``batch -> Bool[N]``, True for those kept.

In a recipe's ``select`` they act before rewards are turned into advantages, so the statistics are of what is kept, and
the loop draws further prompts until enough are left. In ``keep`` they act after: the advantages are of all. Greedy
baselines stay with their group; the loop drops them before the update.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from posttrain.batch import Batch, Finish
from posttrain.option_types import facts


@facts(compares_group=True)
def mixed_groups(batch: Batch) -> Bool[Tensor, " N"]:
    """Groups from which there is something to learn: whose completions did not all get the same verifier score.

    kept = max_G score > min_G score, which for scores of 0 and 1 is 0 < accuracy < 1

    Yu et al. 2025 (DAPO, dynamic sampling), eq. 11, arXiv:2503.14476.

    Decided on ``score``, what the verifiers said, not on ``reward``: a length penalty does not make a solved prompt
    worth learning from. Unscored completions have no say, but stay or go with their group.
    """
    valid = ~batch.score.isnan() & ~batch.baseline_only
    _, index = batch.group.unique(return_inverse=True)
    highest = _group_extreme(batch.score.where(valid, -torch.inf), index, "amax")
    lowest = _group_extreme(batch.score.where(valid, torch.inf), index, "amin")
    return highest > lowest


@facts(compares_group=True)
def max_variance(batch: Batch, *, keep: Annotated[int, Field(ge=2)]) -> Bool[Tensor, " N"]:
    """In each group, the ``keep`` completions whose rewards have the largest variance.

    kept = the k smallest and the keep - k largest rewards, for the best k

    Xu et al. 2025 (PODS), arXiv:2504.13818.

    Unscored completions go; a group with no more than ``keep`` scored ones keeps those. Of equal rewards, the earlier
    row is the smaller.

    Raises:
        ValueError: if ``keep`` is less than 2.
    """
    if keep < 2:
        raise ValueError(f"max_variance: at least 2 completions a group have a variance, not keep={keep}")
    kept = batch.baseline_only.clone()
    valid = batch.scored & ~batch.baseline_only
    for group in batch.group.unique():
        rows = (valid & (batch.group == group)).nonzero().squeeze(-1)
        rows = rows[batch.reward[rows].argsort(stable=True)]
        kept[_widest(rows, batch.reward.double(), keep) if len(rows) > keep else rows] = True
    return kept


def finished(batch: Batch) -> Bool[Tensor, " N"]:
    """Completions that ended by themselves; those cut off at the length limit, or aborted, say nothing of their end.

    Yu et al. 2025 (DAPO, overlong filtering), section 3.4, arXiv:2503.14476.
    """
    return (batch.finish == Finish.STOPPED) | batch.baseline_only


def _widest(rows: Int[Tensor, " n"], reward: Float[Tensor, " N"], keep: int) -> Int[Tensor, " k"]:
    """Of rows in ascending order of reward, the ``keep`` from both ends with the largest variance; each end has one."""
    ends = [torch.cat([rows[:k], rows[len(rows) - keep + k :]]) for k in range(1, keep)]
    return max(ends, key=lambda subset: float(reward[subset].var(correction=0)))


def _group_extreme(values: Float[Tensor, " N"], index: Int[Tensor, " N"], reduce: str) -> Float[Tensor, " N"]:
    return torch.zeros_like(values).scatter_reduce(0, index, values, reduce, include_self=False)[index]
