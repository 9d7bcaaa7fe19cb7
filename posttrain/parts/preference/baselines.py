"""Baselines ``(batch) -> [N]``: numbers that are subtracted from scores, computed once before the update.

They read ``logp_old``, the policy's log-probs before the update, and sums over all ranks, so they do not depend on how
the batch is split. ``batch.baseline_only`` marks completions that serve as a baseline alone and are dropped before the
update.

Notation: s_i = Σ_t (log π_old(y_it) - log π_ref(y_it)), the log-ratio of completion i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.batch import Batch, seq_sum
from posttrain.option_types import facts
from posttrain.parts.preference.groups import find_pairs, labelled
from posttrain.parts.ratio import needed


@facts(needs_mismatched=True)
def mismatched(batch: Batch) -> Float[Tensor, " N"]:
    """Estimate of KL(π ‖ π_ref) from completions that follow prompts that they do not answer.

    b = max(0, mean_j s_j), over the baseline completions j of all ranks

    Ethayarajh et al. 2024 (KTO), arXiv:2402.01306. Batches must hold a baseline completion
    (``baseline_only``) for each prompt: the completion of another one.

    Raises:
        ValueError: if the batch holds no such completion.
    """
    count = batch.total(batch.baseline_only)
    if count == 0:
        raise ValueError("mismatched: the batch holds no completion of another prompt to estimate the divergence from")
    total = batch.total(_log_ratio(batch).where(batch.baseline_only, 0.0))
    return (total / count).clamp(min=0).expand(len(batch))


@dataclass
class running_mean:
    """Mean log-ratio of all labelled completions so far: the threshold of a classifier of log-ratios.

    b = Σ s_i / n, over all batches up to this one

    Jung et al. 2024 (BCO, reward shift), arXiv:2404.04656.
    """

    state: dict[str, Any] = field(default_factory=lambda: {"sum": 0.0, "count": 0}, init=False)

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        valid = labelled(batch)
        self.state["sum"] += float(batch.total(_log_ratio(batch).where(valid, 0.0)))
        self.state["count"] += int(batch.total(valid))
        return batch.reward.new_full((len(batch),), self.state["sum"] / max(1, self.state["count"]))


def sorted_reference(batch: Batch) -> Float[Tensor, " N"]:
    """Shift that compares the k-th smallest margin of the policy with the k-th smallest of the reference.

    b_i = m'_(k) - m'_i at the chosen completion of pair i, whose margin m_i = log π(y_w) - log π(y_l) is the k-th
    smallest; m' is that of the reference. 0 elsewhere. For the margin ``baseline``.

    Melnyk et al. 2024 (AOT, paired), arXiv:2406.05882. Sorts the pairs of one process.
    """
    chosen, rejected = find_pairs(batch)
    policy, reference = (seq_sum(needed(batch, name), batch.mask) for name in ("logp_old", "logp_ref"))
    margin, reference_margin = policy[chosen] - policy[rejected], reference[chosen] - reference[rejected]
    matched = torch.empty_like(reference_margin)
    matched[margin.argsort()] = reference_margin.sort().values
    return torch.zeros_like(policy).index_add(0, chosen, matched - reference_margin)


def sorted_pairs(batch: Batch) -> Int[Tensor, " N"]:
    """New groups that pair the k-th smallest log-ratio of a chosen completion with the k-th smallest of a rejected one.

    Melnyk et al. 2024 (AOT, unpaired), arXiv:2406.05882: stochastic dominance of the chosen ones as a whole. Sorts the
    completions of one process. Chosen ones have a label above 0.

    Raises:
        ValueError: if the numbers of chosen and rejected completions differ.
    """
    ratio, valid, good = _log_ratio(batch), labelled(batch), batch.reward > 0
    chosen, rejected = ((valid & kind).nonzero().squeeze(-1) for kind in (good, ~good))
    if len(chosen) != len(rejected):
        raise ValueError(
            f"sorted_pairs: {len(chosen)} chosen completions cannot be paired with {len(rejected)} rejected ones"
        )
    group = torch.arange(len(batch), device=ratio.device) + len(chosen)  # without a label: a group of its own
    for rows in (chosen, rejected):
        group[rows[ratio[rows].argsort()]] = torch.arange(len(rows), device=ratio.device)
    return group


def _log_ratio(batch: Batch) -> Float[Tensor, " N"]:
    """Log-ratio of each completion before the update."""
    return seq_sum(needed(batch, "logp_old") - needed(batch, "logp_ref"), batch.mask)
