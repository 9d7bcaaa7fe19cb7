"""Weights of loss terms ``(outputs, batch) -> [N, L]``: factors without gradient, at each token.

Most correct for what the engine sampled from not being the policy that is trained (another kernel, another precision,
quantised weights). Notation: w_t = π_old(y_t) / μ(y_t), the trainer's probability before the update over
the engine's. A weight of 0 drops a token from the loss, not from the counts of the normaliser.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, broadcast, group_mean, seq_mean, seq_sum
from posttrain.option_types import AtLeastOne, Fraction, Positive
from posttrain.parts.ratio import log_ratio, needed


def truncated_importance(outputs: Outputs, batch: Batch, *, cap: Positive = 2.0) -> Float[Tensor, "N L"]:
    """Importance weight, bounded from above.

    weight_t = min(w_t, cap)

    Yao et al. 2025 (TIS), "Your efficient RL framework secretly brings you off-policy RL training", blog post,
    fengyao.notion.site/off-policy-rl.
    """
    if cap <= 0:
        raise ValueError(f"truncated_importance: cap bounds a ratio and must be positive, not {cap}")
    return _log_weight(batch).exp().clamp(max=cap) * batch.mask


def masked_importance(
    outputs: Outputs, batch: Batch, *, low: Fraction = 0.5, high: AtLeastOne = 5.0
) -> Float[Tensor, "N L"]:
    """Importance weight where it is moderate; tokens on which trainer and engine disagree are dropped.

    weight_t = w_t if low <= w_t <= high, 0 else

    Ling team 2025 (IcePop), arXiv:2510.18855.
    """
    _check_band("masked_importance", low, high)
    weight = _log_weight(batch).exp()
    return weight * ((weight >= low) & (weight <= high)) * batch.mask


def masked_sequence(
    outputs: Outputs, batch: Batch, *, low: Fraction = 0.999, high: AtLeastOne = 1.002
) -> Float[Tensor, "N L"]:
    """1 for completions on which trainer and engine agree on the whole, 0 for the others.

    weight_t = 1 if low <= exp(mean_t log w_t) <= high, 0 else

    Liu et al. 2025, "When speed kills stability", part 3, richardli.xyz/rl-collapse-3; the band is NeMo-RL's.

    Combine with ``truncated_importance`` to weigh the tokens of the completions that stay.
    """
    _check_band("masked_sequence", low, high)
    weight = seq_mean(_log_weight(batch), batch.mask).exp()
    return broadcast(((weight >= low) & (weight <= high)).float(), batch.mask)


def tilted(outputs: Outputs, batch: Batch, *, beta: Positive = 1.0) -> Float[Tensor, "N L"]:
    """Completions as if they were samples of the tilted law π_ref exp(R / β) / Z, for a value of that policy.

    weight_i = G · softmax_i(R_i / β + Σ_t log π_ref(y_t) - log μ(y_t)) over the group's G completions, with μ the law
    that they were drawn from

    A weighted squared error has its minimum at the self-normalised Σ w R / Σ w. Chakraborty et al. 2024 (TQ*, indirect
    transfer), arXiv:2405.20495, with the reward that the policy μ is optimal for, r_BL = β log(μ / π_ref): then w is
    exp((R - r_BL) / β).

    Args:
        beta: temperature, in units of reward.
    """
    ratio = seq_sum(log_ratio(needed(batch, "logp_ref"), batch.logp_sampler, batch.mask), batch.mask)
    valid = batch.scored & ~batch.baseline_only
    log_weight = (batch.reward / beta + ratio).where(valid, -torch.inf)
    _, index = batch.group.unique(return_inverse=True)
    top = torch.full_like(log_weight, -torch.inf).scatter_reduce(0, index, log_weight, "amax")[index]
    weight = (log_weight - top).exp().where(valid, 0.0)
    weight = weight / group_mean(weight, batch.group, valid).clamp(min=1e-30)
    return weight[:, None].expand(batch.mask.shape)


def _log_weight(batch: Batch) -> Float[Tensor, "N L"]:
    return log_ratio(needed(batch, "logp_old").detach(), batch.logp_sampler, batch.mask)


def _check_band(name: str, low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"{name}: the ratios that are kept lie in [low, high] around 1, not in [{low}, {high}]")
