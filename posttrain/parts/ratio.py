"""Helpers of losses and weights: log-ratios of two policies, and access to fields that another stage fills."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 is beyond every clip and still far from float32's limit


def log_ratio(
    now: Float[Tensor, "N L"], before: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L"]:
    """Log-ratio log p_now - log p_before at chosen tokens, clamped to ±20; exactly 0 elsewhere, even for NaN.

    So the ratio of padding is exactly 1, and no ratio is infinite.
    """
    return (now - before).where(mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def needed(
    batch: Batch, field: Literal["logp_old", "logp_ref", "advantage", "value", "target"]
) -> Float[Tensor, "N L"]:
    """Returns a field of the batch that an earlier stage of the loop fills.

    Raises:
        ValueError: if that stage has not run.
    """
    tensor = getattr(batch, field)
    if tensor is None:
        raise ValueError(f"batch.{field} has not been filled, and a part of this recipe reads it")
    return tensor
