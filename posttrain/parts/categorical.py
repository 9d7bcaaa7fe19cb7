"""Numbers as distributions over the bins of a categorical head, and back.

``support`` are the centres of the bins, ascending and equally spaced; w is their distance.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA = 0.75
"""Standard deviation of HL-Gauss in bin widths: Farebrother et al. 2024, arXiv:2403.03950."""


def widened(low: float, high: float, bins: int, *, sigma: float = SIGMA, margin: float = 3.0) -> tuple[float, float]:
    """Centres of the outermost bins such that HL-Gauss is unbiased on all of [low, high].

    low' = low - (margin · sigma - ½) w,  high' = high + (margin · sigma - ½) w,  w = (high' - low') / (bins - 1)

    A target nearer than a few deviations to the outer edge loses a tail of its Gaussian there and is decoded too far
    inside: by 0.80 σ at the edge itself, by 0.0044 σ at three deviations from it. For rewards in [0, 1] and 101 bins
    this gives (-0.018, 1.018) and an error of 3e-5; 5 bins have no room left.

    Raises:
        ValueError: with too few bins for the margin, or an empty range.
    """
    beyond = max(margin * sigma - 0.5, 0.0)
    inner = bins - 1 - 2 * beyond
    if inner <= 0 or high <= low:
        raise ValueError(
            f"{bins} bins do not reach from {low} to {high} with {beyond:g} bins to spare on both sides: "
            f"at least {math.floor(2 * beyond) + 2} are needed, and low < high"
        )
    width = (high - low) / inner
    return low - beyond * width, high + beyond * width


def hl_gauss_target(
    values: Float[Tensor, "*S"], support: Float[Tensor, " K"], *, sigma: float = SIGMA
) -> Float[Tensor, "*S K"]:
    """A Gaussian around each value as probabilities of the bins, renormalised to what lies on the support.

    p_i = (Φ((z_i + w/2 - y) / σ) - Φ((z_i - w/2 - y) / σ)) / (Φ((z_K + w/2 - y) / σ) - Φ((z_1 - w/2 - y) / σ))

    Imani and White 2018, arXiv:1806.04613; Farebrother et al. 2024 (Stop Regressing), arXiv:2403.03950.

    Args:
        values: those beyond the outer centres are taken as the outer centre.
        sigma: σ in bin widths.
    """
    width = _width(support)
    edges = torch.cat([support - width / 2, support[-1:] + width / 2])
    below = torch.special.ndtr((edges - values.clamp(support[0], support[-1])[..., None]) / (sigma * width))
    return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])


def two_hot_target(values: Float[Tensor, "*S"], support: Float[Tensor, " K"]) -> Float[Tensor, "*S K"]:
    """Weight on the two bins around each value, in inverse proportion to their distance: decoding gives the value back.

    Schrittwieser et al. 2020 (MuZero), appendix F, arXiv:1911.08265.

    Args:
        values: those beyond the outer centres are taken as the outer centre.
    """
    inside = values.clamp(support[0], support[-1])[..., None]
    return (1 - (inside - support).abs() / _width(support)).clamp(min=0)


def project(
    probabilities: Float[Tensor, "*S M"], atoms: Float[Tensor, "*S M"], support: Float[Tensor, " K"]
) -> Float[Tensor, "*S K"]:
    """A distribution on any atoms, carried over to the bins; its mean stays where no atom lies beyond them.

    p_i = Σ_j q_j max(0, 1 - |clamp(a_j) - z_i| / w)

    Bellemare et al. 2017 (C51), eq. 7, arXiv:1707.06887.
    """
    return (probabilities[..., None] * two_hot_target(atoms, support)).sum(-2)


def decode(logits: Float[Tensor, "*S K"], support: Float[Tensor, " K"]) -> Float[Tensor, "*S"]:
    """Mean of the distribution that a categorical head puts out: Σ_i softmax_i z_i."""
    return (logits.softmax(-1) * support).sum(-1)


def _width(support: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    return (support[-1] - support[0]) / (len(support) - 1)
