"""Quality of a ranking over all ranks: how well scores or values put the better completions above the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch
from posttrain.parts.preference.groups import find_pairs, labelled
from posttrain.system.processes import Processes
from posttrain.training.value_metrics import last_chosen, mean


def area_under_curve(score: Float[Tensor, " M"], positive: Bool[Tensor, " M"]) -> float:
    """Probability that a random positive has a higher score than a random negative; a tie counts one half.

    AUC = (Σ rank of the positives - P (P + 1) / 2) / (P N), with mean ranks for ties: the area under the ROC curve is
    the Mann-Whitney statistic (Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve").

    Returns:
        A number from 0 to 1; NaN if all are positive, if none is, or if a score is NaN.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or bool(score.isnan().any()):
        return math.nan
    _, place, count = score.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def area_over_ranks(score: Sequence[Tensor], positive: Sequence[Tensor], processes: Processes) -> float:
    """The area under the curve of what all ranks hold together; each may hold several tensors, or none."""
    own = [torch.cat(list(parts)).cpu() if parts else torch.zeros(0) for parts in (score, positive)]
    shares = processes.gather((own[0].double(), own[1].bool()))
    return area_under_curve(torch.cat([score for score, _ in shares]), torch.cat([sign for _, sign in shares]))


def ranking_by_value(batches: Sequence[Batch], processes: Processes) -> dict[str, float]:
    """Metrics that say how a value model ranks completions from a dataset, over all ranks.

    Returns:
        ``value/pair_accuracy``: share of the pairs of a group in which the better completion has the higher value at
        its end (a tie counts one half), and ``value/margin``, the mean difference; without pairs neither is there.
        ``value/auc``: area under the ROC curve of the values at the states whose target is 0 or 1; left out if there
        are other targets, or one of the two kinds is missing.
    """
    gaps, scores, positives, binary = [], [], [], True
    for batch in batches:
        if batch.value is None or batch.target is None:
            return {}
        at_end = batch.value.gather(-1, last_chosen(batch.mask).clamp(min=0)[:, None]).squeeze(-1)
        chosen, rejected = find_pairs(batch)
        gaps.append((at_end[chosen] - at_end[rejected]).double().cpu())
        taught = batch.states & batch.target.isfinite() & labelled(batch)[:, None]
        target = batch.target[taught]
        binary = binary and bool(((target == 0) | (target == 1)).all())
        scores.append(batch.value[taught])
        positives.append(target == 1)
    gap = torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.float64)
    accuracy = mean(0.5 + 0.5 * gap.sign(), processes.all_sum)
    metrics = {"value/pair_accuracy": accuracy, "value/margin": mean(gap, processes.all_sum)}
    if not processes.all_max(int(not binary)):
        metrics["value/auc"] = area_over_ranks(scores, positives, processes)
    return {name: number for name, number in metrics.items() if not math.isnan(number)}
