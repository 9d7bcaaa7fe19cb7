"""Margins ``(pairs) -> [P]``: numbers subtracted from h = beta (s_w - s_l) before the link; several add up."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import seq_sum
from posttrain.option_types import Fraction, NonNegative
from posttrain.parts.preference.groups import Pairs, column


def constant(pairs: Pairs, *, gamma: float = 1.6) -> Float[Tensor, " P"]:
    """Constant margin, equal for all pairs.

    m = γ

    Meng et al. 2024 (SimPO), eq. 6, arXiv:2405.14734; 1.6 is 0.8 times their beta of 2.
    """
    return torch.full_like(pairs.margin, gamma)


def given(pairs: Pairs, *, name: str = "margin", scale: float = 1.0) -> Float[Tensor, " P"]:
    """Margin from the data: a column of the chosen completion's row.

    m = scale · margin

    Touvron et al. 2023 (Llama 2), arXiv:2307.09288, with the annotator's rating of how much better it is.
    Zhou et al. 2023 (MODPO), arXiv:2310.03708, with the difference of the other objectives' weighted rewards,
    ``scale`` of 1 / w_0 and the term's ``beta`` over w_0.
    """
    return scale * column(pairs.batch, pairs.chosen.tolist(), name)


def reward_gap(pairs: Pairs, *, scale: float = 1.0, form: Literal["linear", "log"] = "log") -> Float[Tensor, " P"]:
    """Margin from the labels: a function of their difference.

    m = α log(r_w - r_l), or α (r_w - r_l)

    Amini et al. 2024 (ODPO), arXiv:2402.10571.
    """
    better, worse = pairs.both(pairs.batch.reward)
    gap = better - worse
    return scale * (gap.log() if form == "log" else gap)


def length_gap(pairs: Pairs, *, alpha: float = 0.01) -> Float[Tensor, " P"]:
    """Length margin: less is learned from a pair whose chosen completion is the longer one, and more from the others.

    m = α (n_l - n_w), with the numbers of tokens n

    Park et al. 2024 (R-DPO), arXiv:2403.19159: a reward of r - α n for n tokens, in the sign of the authors' code.
    """
    chosen, rejected = pairs.both(pairs.batch.tokens_chosen)
    return alpha * (rejected - chosen).to(pairs.score.dtype)


def chosen_loss(pairs: Pairs, *, lam: NonNegative = 50.0) -> Float[Tensor, " P"]:
    """Margin that grows once the chosen completion is less likely than under the reference.

    m = λ beta max(0, -s_w)

    Pal et al. 2024 (DPOP, Smaug), arXiv:2402.13228.

    So a pair cannot be won by making both completions less likely.
    """
    chosen, _ = pairs.both(pairs.score)
    return lam * (-chosen).clamp(min=0)


def rejected_share(pairs: Pairs, *, bias: Fraction = 0.5) -> Float[Tensor, " P"]:
    """Reduces the rejected completion's score to a share, so that the policy stays close to the data.

    m = -(1 - bias) beta s_l

    Hejna et al. 2023 (CPL), arXiv:2310.13639.
    """
    _, rejected = pairs.both(pairs.score)
    return (bias - 1) * rejected


def token_kl(pairs: Pairs, *, alpha: NonNegative = 0.5, chosen_gradient: bool = False) -> Float[Tensor, " P"]:
    """Difference of both completions' KL divergences from the reference, exact over the vocabulary.

    m = beta α (K_l - sg[K_w]), with K = Σ_t KL(π_ref(· | y_<t) ‖ π(· | y_<t))

    Zeng et al. 2024 (TDPO2), arXiv:2404.11999. With ``alpha: 1`` and ``chosen_gradient: true``: TDPO1.

    Raises:
        ValueError: if the forward pass has not computed the divergences.
    """
    if pairs.outputs.kl_ref is None:
        raise ValueError("the margin token_kl needs outputs.kl_ref, which the forward pass did not compute")
    chosen, rejected = pairs.both(seq_sum(pairs.outputs.kl_ref, pairs.batch.mask))
    return pairs.beta * alpha * (rejected - (chosen if chosen_gradient else chosen.detach()))


def baseline(pairs: Pairs) -> Float[Tensor, " P"]:
    """Margin from the recipe's ``baseline`` slot, at the chosen completion.

    m = beta b_w

    Raises:
        ValueError: if the recipe has no such slot.
    """
    if pairs.batch.baseline is None:
        raise ValueError("the margin baseline reads what the slot `baseline` fills, and the recipe has none")
    chosen, _ = pairs.both(pairs.batch.baseline)
    return pairs.beta * chosen
