"""Numbers as distributions over the bins of a categorical head: the targets that such a head learns.

``support`` are the centres of the bins, ascending and equally spaced; w is their distance.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA = 0.75
"""Standard deviation of HL-Gauss in bin widths: Farebrother et al. 2024, arXiv:2403.03950."""


def hl_gauss_target(
    values: Float[Tensor, "*S"], support: Float[Tensor, " K"], *, sigma: float = SIGMA
) -> Float[Tensor, "*S K"]:
    """Probabilities of the bins under a Gaussian around each value, renormalised over the support.

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
    """Probabilities of the two bins around each value, larger for the nearer one: their mean is the value itself.

    Schrittwieser et al. 2019 (MuZero), appendix F, arXiv:1911.08265.

    Args:
        values: those beyond the outer centres are taken as the outer centre.
    """
    inside = values.clamp(support[0], support[-1])[..., None]
    return (1 - (inside - support).abs() / _width(support)).clamp(min=0)


def project(
    probabilities: Float[Tensor, "*S M"], atoms: Float[Tensor, "*S M"], support: Float[Tensor, " K"]
) -> Float[Tensor, "*S K"]:
    """Projects a distribution over any atoms onto the bins; its mean stays the same if no atom is beyond them.

    p_i = Σ_j q_j max(0, 1 - |clamp(a_j) - z_i| / w)

    Bellemare et al. 2017 (C51), eq. 7, arXiv:1707.06887.
    """
    return (probabilities[..., None] * two_hot_target(atoms, support)).sum(-2)


def _width(support: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Width of a bin."""
    return (support[-1] - support[0]) / (len(support) - 1)
