"""Weights of loss terms ``(outputs, batch) -> [N, L]``: factors without gradient, at each token.

Most of them correct for an engine that does not sample exactly from the policy that is trained (another kernel, another
precision, quantised weights). Notation: w_t = π_old(y_t) / μ(y_t), the trainer's probability before the update over
the engine's. A weight of 0 drops a token from the loss, not from the counts of the normaliser.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, broadcast, group_max, group_mean, seq_mean, seq_sum
from posttrain.option_types import AtLeastOne, Fraction, Positive
from posttrain.parts.ratio import log_ratio, needed


def truncated_importance(outputs: Outputs, batch: Batch, *, cap: Positive = 2.0) -> Float[Tensor, "N L"]:
    """Importance weight of each token, bounded from above.

    weight_t = min(w_t, cap)

    Yao et al. 2025 (TIS), "Your efficient RL framework secretly brings you off-policy RL training", blog post,
    fengyao.notion.site/off-policy-rl.
    """
    if cap <= 0:
        raise ValueError(f"truncated_importance: cap is the bound of a ratio and must be positive, not {cap}")
    return _log_weight(batch).exp().clamp(max=cap) * batch.mask


def masked_importance(
    outputs: Outputs, batch: Batch, *, low: Fraction = 0.5, high: AtLeastOne = 5.0
) -> Float[Tensor, "N L"]:
    """Importance weight of each token, or 0 (the token is dropped) where trainer and engine disagree too much.

    weight_t = w_t if low <= w_t <= high, 0 else

    Ling team 2025 (IcePop), arXiv:2510.18855.
    """
    _check_band("masked_importance", low, high)
    weight = _log_weight(batch).exp()
    return weight * ((weight >= low) & (weight <= high)) * batch.mask


def masked_sequence(
    outputs: Outputs, batch: Batch, *, low: Fraction = 0.999, high: AtLeastOne = 1.002
) -> Float[Tensor, "N L"]:
    """Weight 1 for completions on which trainer and engine agree on average, 0 for all others.

    weight_t = 1 if low <= exp(mean_t log w_t) <= high, 0 else

    Liu et al. 2025, "When speed kills stability", part 3, richardli.xyz/rl-collapse-3; the band is NeMo-RL's.

    Combine it with ``truncated_importance`` to weight the tokens of the remaining completions.
    """
    _check_band("masked_sequence", low, high)
    weight = seq_mean(_log_weight(batch), batch.mask).exp()
    return broadcast(((weight >= low) & (weight <= high)).float(), batch.mask)


def tilted(outputs: Outputs, batch: Batch, *, beta: Positive = 1.0) -> Float[Tensor, "N L"]:
    """Weights completions as if they were samples of the tilted distribution π_ref exp(R / β) / Z.

    weight_i = G · softmax_i(R_i / β + Σ_t log π_ref(y_t) - log μ(y_t)) over the group's G completions, with μ the
    distribution that they were drawn from

    So a value model learns the values of that distribution: a weighted squared error has its minimum at the
    self-normalised Σ w R / Σ w. Chakraborty et al. 2024 (TQ*, indirect transfer), arXiv:2405.20495, with the reward
    that the policy μ is optimal for, r_BL = β log(μ / π_ref): then w is exp((R - r_BL) / β).

    Args:
        beta: temperature, in units of reward.
    """
    ratio = seq_sum(log_ratio(needed(batch, "logp_ref"), batch.logp_sampler, batch.mask), batch.mask)
    valid = batch.trained
    log_weight = batch.reward / beta + ratio
    weight = (log_weight - group_max(log_weight, batch.group, valid)).exp().where(valid, 0.0)
    weight = weight / group_mean(weight, batch.group, valid).clamp(min=1e-30)
    return weight[:, None].expand(batch.mask.shape)


def _log_weight(batch: Batch) -> Float[Tensor, "N L"]:
    """Log of the importance weight w_t of each token."""
    return log_ratio(needed(batch, "logp_old").detach(), batch.logp_sampler, batch.mask)


def _check_band(name: str, low: float, high: float) -> None:
    """Raises ValueError if the band does not contain 1."""
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"{name}: [low, high] must contain the ratio 1; it is [{low}, {high}]")
