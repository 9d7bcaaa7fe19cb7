"""What losses and weights share: log-ratios of two policies, and access to the fields of a batch that they need."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8 is beyond every clip and still far from float32's limit
Filled = Literal["logp_old", "logp_ref", "advantage", "value", "target"]


def log_ratio(
    now: Float[Tensor, "N L"], before: Float[Tensor, "N L"], mask: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L"]:
    """log p_now - log p_before at chosen tokens, clamped to ±20; exactly 0 elsewhere, whatever lies there.

    So the ratio of padding is exactly 1, and no ratio is infinite.
    """
    return (now - before).where(mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def needed(
    batch: Batch, field: Literal["logp_old", "logp_ref", "advantage", "value", "target"]
) -> Float[Tensor, "N L"]:
    """A field of the batch that an earlier stage of the loop fills.

    Raises:
        ValueError: if that stage has not run.
    """
    tensor = getattr(batch, field)
    if tensor is None:
        raise ValueError(f"batch.{field} has not been filled, and a part of this recipe reads it")
    return tensor
