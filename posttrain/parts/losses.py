"""Loss terms: per token ``[N, L]``, to be minimised, zero (and of zero gradient) off the mask.

A term says nothing about coefficients, weights or averages: those belong to the recipe's loss entry and normaliser.
It is called on micro-batches, so it may look across one completion but never across completions.

Notation: ρ_t = π(y_t) / π_old(y_t), the ratio of the policy now to the policy before the update; A_t the advantage;
sg[x] is x without gradient. Log-ratios are clamped to ±20 before exp, so that no ratio is infinite.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, broadcast, seq_mean

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 is beyond every clip and still far from float32's limit


def clip(
    outputs: Outputs,
    batch: Batch,
    *,
    low: float = 0.2,
    high: float = 0.2,
    level: Literal["token", "sequence"] = "token",
    dual: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "N L"]:
    """Clipped surrogate: the ratio earns nothing beyond [1 - low, 1 + high].

    loss_t = -min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t).  Schulman et al. 2017 (PPO), eq. 7, arXiv:1707.06347;
    ``high`` > ``low``: Yu et al. 2025 (DAPO), eq. 10, arXiv:2503.14476.

    Args:
        level: ``sequence`` puts the geometric mean of a completion's ratios in place of each of them, in the token
            form whose gradient reaches every token: sg[s] · π(y_t) / sg[π(y_t)] with s = exp(mean_t log ρ_t).
            Zheng et al. 2025 (GSPO), eq. 7 and 13-14, arXiv:2507.18071. Goes with ``seq_mean_of_token_mean``.
        dual: c > 1 bounds the loss of A < 0 by -c A: a ratio beyond c gives no gradient.
            Ye et al. 2020 (dual-clip PPO), eq. 5, arXiv:1912.09729.
        cap: δ > 1 + ``high`` replaces the first ρ_t by min(ρ_t, δ), the same bound with its value.
            INTELLECT-2 2025 (two-sided clipping), section 3.4, arXiv:2505.07291.

    Raises:
        ValueError: for a bound on the wrong side of 1.
    """
    _check_bounds(low, high, dual, cap)
    log_ratio = _log_ratio(outputs, batch)
    if level == "sequence":
        log_ratio = _sequence_log_ratio(log_ratio, batch)
    ratio, advantage = log_ratio.exp(), _needed(batch, "advantage").where(batch.mask, 0.0)
    unclipped = ratio if cap is None else ratio.clamp(max=cap)
    gain = torch.minimum(unclipped * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual * advantage), gain)
    return (-gain).where(batch.mask, 0.0)


def _check_bounds(low: float, high: float, dual: float | None, cap: float | None) -> None:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip: low must lie in [0, 1] and high be at least 0, not low={low}, high={high}")
    if dual is not None and dual <= 1:
        raise ValueError(f"clip: dual bounds a ratio from above and must exceed 1, not {dual}")
    if cap is not None and cap <= 1 + high:
        raise ValueError(f"clip: cap must exceed 1 + high = {1 + high:g}, or it clips what high allows; it is {cap}")


def _sequence_log_ratio(log_ratio: Float[Tensor, "N L"], batch: Batch) -> Float[Tensor, "N L"]:
    """Each completion's mean log-ratio as a value, each token's own log-prob as the gradient."""
    mean = broadcast(seq_mean(log_ratio.detach(), batch.mask), batch.mask)
    return mean + (log_ratio - log_ratio.detach())


def _log_ratio(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """log π - log π_old at chosen tokens, clamped; exactly 0 elsewhere, so that the ratio of padding is exactly 1."""
    difference = (outputs.logp - _needed(batch, "logp_old")).where(batch.mask, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _needed(batch: Batch, field: str) -> Tensor:
    tensor = getattr(batch, field)
    if tensor is None:
        raise ValueError(f"batch.{field} has not been filled, and this loss term reads it")
    return tensor
