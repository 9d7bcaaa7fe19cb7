"""Supervised steps on demonstrations, which make the models that the quickstart and the benchmarks start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posttrain.batch import pad
from posttrain.models.policy import Policy
from posttrain.recipe.sections import OptimizerSection
from posttrain.training.optimiser import learning_rate


class Example(NamedTuple):
    """A prompt and the completion to imitate, as token ids; the completion ends with the end-of-sequence token."""

    prompt: Sequence[int]
    completion: Sequence[int]


def fit(
    policy: Policy,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    optimizer: OptimizerSection,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Minimises the negative log-likelihood of the completions with AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Args:
        policy: the policy, trained in place, on its device.
        examples: the demonstrations; each pass over them has a new random order.
        steps: number of optimiser steps.
        batch_size: number of examples a step.
        optimizer: the recipe section of that name.
        seed: seed of the order of the examples.
        on_step: called after each step with its number (from 1) and metrics: ``loss`` in nats a token, ``grad_norm``.
    """
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(weights, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
    policy.train()
    for step, rows in enumerate(shuffled_batches(len(examples), batch_size, steps, seed)):
        adamw.param_groups[0]["lr"] = learning_rate(optimizer, step, steps)
        tokens, mask = to_tensors([examples[row] for row in rows])
        loss = negative_log_likelihood(policy, tokens, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, optimizer.max_grad_norm, error_if_nonfinite=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, {"loss": loss.item(), "grad_norm": norm.item()})


def negative_log_likelihood(policy: Policy, tokens: Int[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of all tokens of ``mask``, in nats."""
    device = policy.base.device
    logp, _ = policy(tokens.to(device), mask.to(device))
    return -logp.sum() / mask.sum()


def to_tensors(examples: Sequence[Example]) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
    """Tokens, zero-padded on the right, and a mask that is True on the completions' tokens."""
    tokens = pad([[*prompt, *completion] for prompt, completion in examples], dtype=torch.long)
    mask = pad([[False] * len(prompt) + [True] * len(completion) for prompt, completion in examples], dtype=torch.bool)
    return tokens, mask


def shuffled_batches(size: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yields ``steps`` batches of row numbers: passes over all rows, each in a new random order.

    Raises:
        ValueError: if there are no rows.
    """
    if size == 0:
        raise ValueError("no examples to learn from")
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += torch.randperm(size, generator=generator).tolist()
        yield waiting[:batch_size]
        del waiting[:batch_size]
