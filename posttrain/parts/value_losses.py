"""Losses of a value model ``(outputs, batch) -> [N, L]``: at each state, to be minimised.

Zero, and of zero gradient, off the states and where the target is NaN. Notation: V_t the value model's output at
column t, T_t its target (``batch.target``), V_old the value before the update (``batch.value``).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.parts.ratio import needed


def mse(outputs: Outputs, batch: Batch, *, clip: float | None = None) -> Float[Tensor, "N L"]:
    """Half the squared error.

    loss_t = ½ (V_t - T_t)²,  with ``clip`` ½ max((V_t - T_t)², (V_old + clamp(V_t - V_old, ±clip) - T_t)²)

    Clipping: Schulman et al. 2016 (GAE), arXiv:1506.02438, in the form of Ouyang et al. 2022, arXiv:2203.02155.

    Args:
        clip: farthest that a value may move from the one before the update before it stops earning anything.

    Raises:
        ValueError: for a ``clip`` that is not positive.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"mse: clip is how far a value may move and must be positive, not {clip}")
    target, learned = _targets(batch)
    value = _value(outputs).where(learned, 0.0)
    loss = (value - target).square()
    if clip is not None:
        old = needed(batch, "value").where(learned, 0.0)
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target).square())
    return 0.5 * loss


def _targets(batch: Batch) -> tuple[Float[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """The targets, 0 where there is none, and where there is one."""
    target = needed(batch, "target")
    learned = batch.states & ~target.isnan()
    return target.where(learned, 0.0), learned


def _value(outputs: Outputs) -> Float[Tensor, "N L"]:
    if outputs.value is None:
        raise ValueError("this value loss needs outputs.value: the recipe has no value model")
    return outputs.value
