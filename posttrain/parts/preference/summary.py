"""Metrics of a preference loss on a batch, which are comparable between methods.

The implicit reward of a completion is beta times the score of the loss term: for DPO beta (log π(y) - log π_ref(y)),
Rafailov et al. 2023, eq. 5, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, seq_sum
from posttrain.parts.preference.groups import find_pairs, labelled


@torch.no_grad()
def summarise(
    outputs: Outputs, batch: Batch, score: Callable[..., Tensor], beta: float
) -> dict[str, Float[Tensor, " X"]]:
    """Numbers by the metric's name, to take the mean of.

    Of the pairs within groups (empty if there are none): ``accuracy``, 1 if the better completion has the higher
    implicit reward, ½ if both are equal, 0 else; ``margin``, the difference of the implicit rewards; ``chosen_reward``,
    ``rejected_reward``, ``chosen_logp`` and ``rejected_logp``, implicit rewards and log-probs of the two sides.

    Of labelled completions, paired or not, under ``by_label/``: the same rewards and log-probs, where the chosen ones
    have a label above 0.
    """
    reward = beta * score(outputs, batch)
    logp = seq_sum(outputs.logp, batch.mask)
    chosen, rejected = find_pairs(batch)
    gap = reward[chosen] - reward[rejected]
    metrics = {"accuracy": 0.5 + 0.5 * gap.sign(), "margin": gap}
    sides = {"chosen": chosen, "rejected": rejected}
    sides |= {f"by_label/{side}": rows for side, rows in by_label(batch).items()}
    for side, rows in sides.items():
        metrics |= {f"{side}_reward": reward[rows], f"{side}_logp": logp[rows]}
    return metrics


def by_label(batch: Batch) -> dict[str, Bool[Tensor, " N"]]:
    """Splits labelled completions into those with a label above 0 and all others."""
    valid = labelled(batch)
    return {"chosen": valid & (batch.reward > 0), "rejected": valid & ~(batch.reward > 0)}
