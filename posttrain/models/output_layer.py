"""The output layer and log-softmax in one operation that never holds the logits of all positions.

Both passes go over the vocabulary in blocks. The forward pass keeps a running maximum and sum per position (Milakov
and Gimelshein 2018, arXiv:1805.02867). The backward pass computes each block of logits again, so that only one block is
held at once, and writes the gradient of the weights block by block into one tensor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_BLOCK = 64  # columns; narrower blocks cost more in calls than they save in memory


class Shape(NamedTuple):
    """Settings of the map from hidden states to logits: z = cap tanh(scale (h Wᵀ + b) / cap) / temperature."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    elements: int = 2**22  # number of logits held at once


class _LogProbs(torch.autograd.Function):
    """The operation behind :func:`log_probs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: Shape, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.shape, ctx.dtype, hidden = shape, hidden.dtype, hidden.to(dtype)
        top = hidden.new_full((len(hidden),), -math.inf, dtype=torch.float32)
        total, moment, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for start, stop in _blocks(len(hidden), len(weight), shape.elements):
            z = _logits(hidden, weight, bias, start, stop, shape)
            rows, columns = _inside(target, start, stop)
            chosen[rows] = z[rows, columns]
            higher = torch.maximum(top, z.amax(-1))
            shrink = (top - higher).exp()
            if entropy:  # Σ p (z - top), moved along with the maximum
                moment = shrink * (moment + torch.where(total > 0, total * (top - higher), 0.0))
            z.sub_(higher[:, None])
            mass = z.exp() if entropy else z.exp_()
            total = total * shrink + mass.sum(-1)
            if entropy:
                moment += mass.mul_(z).sum(-1)
            top = higher
        logp = (chosen - top) - total.log()
        entropies = total.log() - moment / total if entropy else None
        ctx.save_for_backward(hidden, weight, bias, target, top + total.log(), entropies)
        return logp, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_logp, of_entropy = gradients
        hidden, weight, bias, target, log_total, entropies = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = torch.empty_like(bias) if needs_bias else None
        for start, stop in _blocks(len(hidden), len(weight), ctx.shape.elements):
            z = _logits(hidden, weight, bias, start, stop, ctx.shape)
            slope = _slope(z, ctx.shape)
            d = _gradient(z.sub_(log_total[:, None]), of_logp, of_entropy, entropies)
            if of_logp is not None:
                rows, columns = _inside(target, start, stop)
                d[rows, columns] += of_logp[rows]
            d = (d if slope is None else d.mul_(slope)).to(hidden.dtype)
            if of_hidden is not None:
                _add_product(of_hidden, d, weight[start:stop].to(hidden.dtype))
            if of_weight is not None:
                _write_product(of_weight[start:stop], d.T, hidden)
            if of_bias is not None:
                of_bias[start:stop] = d.sum(0)
        of_hidden = None if of_hidden is None else of_hidden.to(ctx.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


def log_probs(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    target: Int[Tensor, " M"],
    shape: Shape,
    *,
    entropy: bool = False,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]:
    """The log-prob log p(target) of each position, and the entropy in nats if asked for; float32, with gradients.

    log p(target) = z_target - log Σ_v exp(z_v), with z as in :class:`Shape`. Under autocast the matrix products are
    computed in its dtype, and their sums in float32.
    """
    return _LogProbs.apply(hidden, weight, bias, target, shape, entropy)  # pyright: ignore[reportReturnType]


def _blocks(rows: int, vocabulary: int, elements: int) -> list[tuple[int, int]]:
    """Cuts the vocabulary into blocks of about the same size, as (start, stop)."""
    widest = max(SMALLEST_BLOCK, elements // max(1, rows))
    count = -(-vocabulary // widest)
    edges = [round(i * vocabulary / count) for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, shape: Shape) -> Tensor:
    """Logits of one block of the vocabulary, in float32; the caller may overwrite them."""
    block_bias = None if bias is None else bias[start:stop].to(hidden.dtype)
    z = torch.nn.functional.linear(hidden, weight[start:stop].to(hidden.dtype), block_bias).float()
    if shape.scale != 1.0:
        z = z.mul_(shape.scale)
    if shape.softcap:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    return z if shape.temperature == 1.0 else z.div_(shape.temperature)


def _slope(z: Tensor, shape: Shape) -> Tensor | float | None:
    """The derivative dz/du of the scaled and capped logits z by the products u; None stands for 1."""
    factor = shape.scale / shape.temperature
    if shape.softcap:
        slope = 1 - (z * (shape.temperature / shape.softcap)).square()
        return slope / shape.temperature if shape.scale == 1.0 else slope * factor
    return None if factor == 1.0 else factor


def _gradient(logp: Tensor, of_logp: Tensor | None, of_entropy: Tensor | None, entropies: Tensor | None) -> Tensor:
    """The gradient dL/dz without the target's share. It overwrites the log-probs of every token.

    dL/dz_v = -p_v (dL/dlogp + dL/dentropy (log p_v + entropy))
    """
    if of_entropy is None:
        assert of_logp is not None
        return logp.exp_().mul_(-of_logp[:, None])
    assert entropies is not None
    inner = of_entropy[:, None] * (logp + entropies[:, None])
    if of_logp is not None:
        inner += of_logp[:, None]
    return logp.exp_().mul_(inner).neg_()


def _inside(target: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Positions whose target is in a block, and the target's column in the block."""
    rows = ((target >= start) & (target < stop)).nonzero().squeeze(-1)
    return rows, target[rows] - start


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _write_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == target.dtype:
        torch.mm(a, b, out=target)
    else:
        target.copy_(a @ b)
