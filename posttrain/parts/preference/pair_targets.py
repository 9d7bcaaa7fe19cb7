"""Targets of pairs ``(pairs) -> [P]``: mostly the probability that the chosen completion is the better one."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from posttrain.option_types import BelowHalf, Positive
from posttrain.parts.preference.groups import Pairs, column


def hard(pairs: Pairs) -> Float[Tensor, " P"]:
    """Hard label: the chosen completion is the better one.

    p = 1, and ½ for a tie
    """
    better, worse = pairs.both(pairs.batch.reward)
    return 0.5 + 0.5 * (better - worse).sign()


def smoothed(pairs: Pairs, *, eps: BelowHalf = 0.1) -> Float[Tensor, " P"]:
    """Smoothed label, for data in which a share of the labels is wrong: the policy stays less certain.

    p = 1 - eps

    Mitchell 2023 (cDPO), "A note on DPO with noisy preferences", ericmitchell.ai/cdpo.pdf.
    """
    return (1 - 2 * eps) * (hard(pairs) - 0.5) + 0.5


def debiased(pairs: Pairs, *, eps: BelowHalf = 0.1) -> Float[Tensor, " P"]:
    """Debiased label, for data in which a share of the labels is flipped: the expected loss is that of clean labels.

    p = (1 - eps) / (1 - 2 eps), and 1 - p = -eps / (1 - 2 eps) is negative

    Chowdhury et al. 2024 (robust DPO), arXiv:2403.00409.
    """
    return (hard(pairs) - 0.5) / (1 - 2 * eps) + 0.5


def soft(pairs: Pairs, *, name: str = "probability") -> Float[Tensor, " P"]:
    """Soft label from the data: a column of the chosen completion's row with the probability that it is the better one.

    Such probabilities come from several judges, a preference model or both orders of one judge.

    Raises:
        ValueError: if a number is outside [0, 1].
    """
    p = column(pairs.batch, pairs.chosen.tolist(), name)
    outside = p[(p < 0) | (p > 1)].tolist()
    if outside:
        raise ValueError(f"soft: column {name!r} should hold probabilities, but holds {outside[0]}")
    return p


def bradley_terry(pairs: Pairs, *, temperature: Positive = 1.0) -> Float[Tensor, " P"]:
    """Probability that the chosen completion is the better one, by a Bradley-Terry model of the rewards.

    p = σ((r_w - r_l) / temperature)

    Bradley and Terry 1952, doi:10.2307/2334029.
    """
    better, worse = pairs.both(pairs.batch.reward)
    return ((better - worse) / temperature).sigmoid()


def reward_gap(pairs: Pairs, *, eta: Positive = 1.0) -> Float[Tensor, " P"]:
    """Difference of the rewards, for the link ``regression``; it is not a probability.

    target = η (r_w - r_l)

    Gao et al. 2024 (REBEL), arXiv:2404.16767.
    """
    better, worse = pairs.both(pairs.batch.reward)
    return eta * (better - worse)
