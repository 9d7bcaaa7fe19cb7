"""Helpers for tests of engines: prompts, settings, and log-probs from a plain forward pass."""

from __future__ import annotations

import torch

from posttrain.engines.base import Completion, Sampling

MAX_MODEL_LEN = 160
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 90)), [5, 6, 7, 8, 200]]
SAMPLING = Sampling(max_tokens=24, temperature=0.7)


@torch.no_grad()
def log_distributions(model, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """The model's log-probs [tokens, V] at each token of a completion, from a plain forward pass."""
    logits = model(torch.tensor([prompt + completion.tokens])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def largest_error(model, outputs: list[list[Completion]], temperature: float) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    errors = []
    for prompt, completions in zip(PROMPTS, outputs, strict=True):
        for completion in completions:
            expected = log_distributions(model, prompt, completion, temperature)
            expected = expected.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            errors.append((expected - torch.tensor(completion.logps)).abs().max())
    return float(max(errors))


@torch.no_grad()
def perturb(model, scale: float = 0.02) -> None:
    """Adds random numbers to all parameters."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
