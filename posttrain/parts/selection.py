"""Selection of completions ``batch -> Bool[N]``: True for the completions that are kept.

In a recipe's ``select`` a selection runs before advantages are computed, so their statistics are over the kept
completions, and the loop draws further prompts until enough are left. In ``keep`` it runs after them: the statistics
are over all completions. Baselines (``batch.baseline_only``) stay with their group; the loop drops them before the
update.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from posttrain.batch import Batch, Finish, group_max, group_min
from posttrain.option_types import facts


@facts(compares_group=True)
def mixed_groups(batch: Batch) -> Bool[Tensor, " N"]:
    """Keeps the groups whose completions did not all get the same verifier score.

    kept = max_G score > min_G score, which for scores of 0 and 1 is 0 < accuracy < 1

    Yu et al. 2025 (DAPO, dynamic sampling), eq. 11, arXiv:2503.14476.

    The comparison uses ``score``, the verifiers' number, not ``reward``: a length penalty does not make a solved prompt
    worth learning from. Unscored completions are ignored in the comparison, but stay or go with their group.
    """
    valid = ~batch.score.isnan() & ~batch.baseline_only
    return group_max(batch.score, batch.group, valid) > group_min(batch.score, batch.group, valid)


@facts(compares_group=True)
def max_variance(batch: Batch, *, keep: Annotated[int, Field(ge=2)]) -> Bool[Tensor, " N"]:
    """Keeps in each group the ``keep`` completions whose rewards have the largest variance.

    kept = the k smallest and the keep - k largest rewards, for the best k

    Xu et al. 2025 (PODS), arXiv:2504.13818.

    Unscored completions are dropped; a group with at most ``keep`` scored ones keeps all of these. Of equal rewards,
    the earlier row counts as the smaller.

    Raises:
        ValueError: if ``keep`` is less than 2.
    """
    if keep < 2:
        raise ValueError(f"max_variance: keep must be at least 2, because one completion has no variance, not {keep}")
    kept = batch.baseline_only.clone()
    valid = batch.trained
    for group in batch.group.unique():
        rows = (valid & (batch.group == group)).nonzero().squeeze(-1)
        rows = rows[batch.reward[rows].argsort(stable=True)]
        kept[_widest(rows, batch.reward.double(), keep) if len(rows) > keep else rows] = True
    return kept


def finished(batch: Batch) -> Bool[Tensor, " N"]:
    """Keeps the completions that ended with a stop; those cut off at the length limit or aborted are dropped.

    Yu et al. 2025 (DAPO, overlong filtering), section 3.4, arXiv:2503.14476.
    """
    return (batch.finish == Finish.STOPPED) | batch.baseline_only


def _widest(rows: Int[Tensor, " n"], reward: Float[Tensor, " N"], keep: int) -> Int[Tensor, " k"]:
    """Chooses ``keep`` rows with the largest variance from both ends of rows in ascending order of reward.

    At least one row comes from each end.
    """
    ends = [torch.cat([rows[:k], rows[len(rows) - keep + k :]]) for k in range(1, keep)]
    return max(ends, key=lambda subset: float(reward[subset].var(correction=0)))
