"""Links of pairs ``(margin, target) -> [P]``: the loss of a pair.

Notation: h is the margin, beta times the difference of the scores minus the recipe's margins; p is the target, the
probability that the chosen completion is the better one. A link f of hard labels becomes p f(h) + (1 - p) f(-h).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.option_types import NonNegative, Positive

MAX_EXPONENT = 80.0  # e^80 is still a float32


def logistic(
    margin: Float[Tensor, " P"], target: Float[Tensor, " P"], *, bound: Positive | None = None
) -> Float[Tensor, " P"]:
    """Negative log-likelihood of a Bradley-Terry model.

    f(h) = -log σ(h)

    Rafailov et al. 2023 (DPO), eq. 7, arXiv:2305.18290.

    Args:
        bound: clips h to [-bound, bound] first. Huang et al. 2024 (χPO), arXiv:2407.13399, use twice the largest
            reward.
    """
    if bound is not None:
        margin = margin.clamp(-bound, bound)
    return _mixed(lambda h: -logsigmoid(h), margin, target)


def hinge(margin: Float[Tensor, " P"], target: Float[Tensor, " P"], *, slack: NonNegative = 1.0) -> Float[Tensor, " P"]:
    """Hinge loss: linear below a margin of ``slack``, 0 above it.

    f(h) = max(0, slack - h)

    Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425.
    """
    return _mixed(lambda h: (slack - h).clamp(min=0), margin, target)


def square(margin: Float[Tensor, " P"], target: Float[Tensor, " P"], *, tau: Positive = 0.1) -> Float[Tensor, " P"]:
    """Squared distance of the margin from a target margin that is finite even for certain labels.

    loss = (h - (p - ½) / τ)²

    Azar et al. 2023 (IPO), eq. 17, arXiv:2310.12036, with ``beta: 1``. Soft p: Calandriello et al. 2024 (online IPO),
    arXiv:2403.08635; it is smaller by a constant than the mixture of both labels' losses.
    """
    return (margin - (target - 0.5) / tau).square()


def regression(margin: Float[Tensor, " P"], target: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Squared distance of the margin from the target itself, such as a difference of rewards.

    loss = (h - target)²

    Gao et al. 2024 (REBEL), arXiv:2404.16767.
    """
    return (margin - target).square()


def exponential(margin: Float[Tensor, " P"], target: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Exponential loss, with exponents cut at 80.

    f(h) = e^-h

    Tang et al. 2024 (generalised preference optimisation), arXiv:2402.05749.
    """
    return _mixed(_exp_of_minus, margin, target)


def sigmoid(margin: Float[Tensor, " P"], target: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Probability that the policy prefers the wrong completion: a loss that saturates on both sides.

    f(h) = 1 - σ(h)

    The second part of D'Oosterlinck et al. 2024 (APO-down), eq. 8, arXiv:2408.06266.
    """
    return _mixed(lambda h: (-h).sigmoid(), margin, target)


def logistic_exponential(
    margin: Float[Tensor, " P"], target: Float[Tensor, " P"], *, tau: Positive = 0.05
) -> Float[Tensor, " P"]:
    """Blend of the logistic and the exponential loss, which is not convex.

    f(h) = (1 - m) (-log σ(h)) + m e^-h, with m = σ(h / τ)

    Lu et al. 2024 (DiscoPOP), eq. 5, arXiv:2406.08414.
    """

    def blend(h: Tensor) -> Tensor:
        share = (h / tau).sigmoid()
        return -(1 - share) * logsigmoid(h) + share * _exp_of_minus(h)

    return _mixed(blend, margin, target)


def _mixed(f: Callable[[Tensor], Tensor], margin: Tensor, target: Tensor) -> Tensor:
    """Mean of a link's losses for both labels, weighted by their probabilities."""
    return target * f(margin) + (1 - target) * f(-margin)


def _exp_of_minus(h: Tensor) -> Tensor:
    """Computes e^-h, with the exponent cut at 80."""
    return (-h).clamp(max=MAX_EXPONENT).exp()
