"""What a preference loss makes of a batch, in numbers that methods share.

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
    """Numbers to take the mean of, by the metric's name; those of no pair or completion are empty.

    ``accuracy``: whether the better completion of a pair has the higher implicit reward, ½ where they are equal;
    ``margin``: by how much. ``chosen_`` and ``rejected_``: implicit rewards and log-probs of the two sides; where no
    completions are paired, of those with a label above 0 and of the others.
    """
    reward = beta * score(outputs, batch)
    logp = seq_sum(outputs.logp, batch.mask)
    chosen, rejected = find_pairs(batch)
    gap = reward[chosen] - reward[rejected]
    found = {"accuracy": 0.5 + 0.5 * gap.sign(), "margin": gap}
    sides = {"chosen": chosen, "rejected": rejected} if len(chosen) else by_label(batch)
    for side, rows in sides.items():
        found |= {f"{side}_reward": reward[rows], f"{side}_logp": logp[rows]}
    return found


def by_label(batch: Batch) -> dict[str, Bool[Tensor, " N"]]:
    """Completions that are good and bad by themselves."""
    valid = labelled(batch)
    return {"chosen": valid & (batch.reward > 0), "rejected": valid & ~(batch.reward > 0)}
