"""Draws tokens from logits, with a separate random number for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.engines.base import Sampling

BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first


def uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "N count"]:
    """Draws ``count`` numbers in [0, 1) for each seed, float64, on CPU, independent of other seeds."""
    numbers = torch.empty(len(seeds), count, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(numbers, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return numbers


def filters(sampling: Sampling) -> LogitsProcessorList:
    """Makes the processors for min-p, top-k and top-p, in vLLM's order."""
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def draw(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"], temperature: float, processors: LogitsProcessorList
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Draws one token for each row, with its log-prob under the distribution that it was drawn from, float32.

    At temperature 0 the token is the most probable one, and its log-prob is that of the model's own softmax.
    """
    scores = logits.float()
    if temperature > 0:
        scores = processors(None, scores / temperature)  # type: ignore[arg-type]  # they do not read the tokens
        tokens = inverse_cdf(scores.softmax(-1), uniform)
    else:
        tokens = scores.argmax(-1)
    return tokens, scores.gather(-1, tokens[:, None])[:, 0] - scores.logsumexp(-1)


def inverse_cdf(probs: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The first token of each row at which the cumulative probability exceeds ``uniform``; never one of probability 0.

    Probabilities are summed in blocks, then within the block that holds the token, in float64. So no cumulative sum
    over the whole vocabulary is made.
    """
    if probs.shape[-1] % BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -probs.shape[-1] % BLOCK))
    blocks = probs.unflatten(-1, (-1, BLOCK))
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + _first_above(inside, target - before))[:, 0]


def _first_above(cumulative: Float[Tensor, "N K"], target: Float[Tensor, "N 1"]) -> Int[Tensor, "N 1"]:
    """Index of the first entry above the target; rounding never lifts the target to the last entry."""
    below_last = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(target, below_last), right=True)
