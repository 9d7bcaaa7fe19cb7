"""Weights of pairs ``(pairs) -> [P]``: factors without gradient, for pairs that count more than others."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from posttrain.batch import seq_mean
from posttrain.option_types import Positive
from posttrain.parts.preference.groups import Pairs, column


def given(pairs: Pairs, *, name: str = "weight") -> Float[Tensor, " P"]:
    """Weight from the data: a column of the chosen completion's row.

    Raises:
        ValueError: if a number is negative.
    """
    weight = column(pairs.batch, pairs.chosen.tolist(), name)
    if bool((weight < 0).any()):
        raise ValueError(f"column {name!r} should hold weights of at least 0, but holds {float(weight.min())}")
    return weight


def on_policy(pairs: Pairs, *, cap: Positive = 1.0) -> Float[Tensor, " P"]:
    """Likelihood of the pair under the policy, relative to the policy's own samples: simulates on-policy data.

    w = min(cap, w_w w_l), with w_i = exp(mean_t (log π(y_t) - log Σ_v π(v | y_<t)²))

    Zhou et al. 2024 (WPO), eq. 2, arXiv:2406.11827; greedy tokens can make a weight exceed 1.

    Raises:
        ValueError: if the forward pass has not computed log Σ_v π(v)².
    """
    outputs, mask = pairs.outputs, pairs.batch.mask
    if outputs.collision is None:
        raise ValueError("the weight on_policy needs outputs.collision, which the forward pass did not compute")
    chosen, rejected = pairs.both(seq_mean((outputs.logp - outputs.collision).detach(), mask))
    return (chosen + rejected).exp().clamp(max=cap)
