"""Batches with values, for tests of value losses, targets and value-based advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from parts_cases import pad, rough_batch
from torch import Tensor

from posttrain.batch import Batch, Outputs
from posttrain.parts import categorical

EXTRA = ("value_next", "value_share")


def value_batch(seed: int, *, labels: bool = False, plain: bool = False, columns: int = 10) -> Batch:
    """A rough batch with values at its states and NaN elsewhere; a quarter of the targets are NaN.

    Args:
        labels: targets are 0 or 1.
    """
    batch = rough_batch(seed, plain=plain, columns=columns)
    g = torch.Generator().manual_seed(seed + 2)
    shape = batch.mask.shape

    def noise() -> Tensor:
        return torch.randn(shape, generator=g)

    target = (noise() > 0).float() if labels else 0.5 + 0.5 * noise()
    target = target.where(batch.states & (torch.rand(shape, generator=g) > 0.25), torch.nan)
    return batch.set(
        value=noise().where(batch.states, torch.nan),
        value_next=noise().where(batch.states, torch.nan),
        target=target,
        step_id=torch.where(batch.mask, torch.arange(shape[1])[None] // 3, -1),
        rows=tuple({"margin": 0.1 * (i % 3)} if i % 2 else {} for i in range(len(batch))),
    )


def value_outputs(batch: Batch, seed: int, outputs: int = 7) -> Outputs:
    """Random outputs of a value model and a policy: leaves that take gradient, NaN off the states and the mask."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch.mask.shape, generator=g).where(batch.states, torch.nan)
    logits = torch.randn(*batch.mask.shape, outputs, generator=g).where(batch.states[..., None], torch.nan)
    moved = 0.3 * torch.randn(batch.mask.shape, generator=g)
    assert batch.logp_old is not None
    return Outputs(
        logp=(batch.logp_old + moved).requires_grad_(),
        value=value.requires_grad_(),
        value_logits=logits.requires_grad_(),
        support=torch.linspace(-0.5, 1.5, outputs),
    )


def pad_values(batch: Batch, columns: int, fill: float) -> Batch:
    """Pads a batch like ``pad``, including the fields of values."""
    wide = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, columns), value=fill)
        for name in EXTRA
        if getattr(batch, name) is not None
    }
    return pad(batch.set(**dict.fromkeys(wide)), columns, fill).set(**wide)


def on_outputs(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Applies a change to each per-column tensor of the outputs."""
    names = ("logp", "entropy", "value", "value_logits")
    changes = {name: change(getattr(outputs, name)) for name in names if getattr(outputs, name) is not None}
    return replace(outputs, **changes)


def widened(low: float, high: float, bins: int) -> tuple[float, float]:
    """Centres of the outermost bins such that HL-Gauss decodes every value in [low, high] with little bias.

    low' = low - (3 σ - ½) w,  high' = high + (3 σ - ½) w,  w = (high' - low') / (bins - 1), with σ in bin widths
    """
    beyond = 3 * categorical.SIGMA - 0.5
    width = (high - low) / (bins - 1 - 2 * beyond)
    return low - beyond * width, high + beyond * width


def decode(logits: Tensor, support: Tensor) -> Tensor:
    """Mean of the distribution that a categorical head puts out: Σ_i softmax_i z_i."""
    return (logits.softmax(-1) * support).sum(-1)
