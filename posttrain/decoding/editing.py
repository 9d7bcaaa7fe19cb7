"""Editing hidden states at decoding time: RE-Control (Kong et al. 2024, arXiv:2406.05954).

At the last layer an edit is a bias of the logits, W u(h), that never looks at next states; with a linear value
V(h) = w·h it is the constant bias n α W w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.decoding.base import Decoder
from posttrain.decoding.model_scores import HiddenValue
from posttrain.engines.base import Completion, OnCompletion, Sampling
from posttrain.engines.transformers import TransformersEngine


def edit(hidden: Float[Tensor, "*S H"], value: HiddenValue, *, step_size: float, steps: int) -> Float[Tensor, "*S H"]:
    """The edit u after ``steps`` gradient steps u <- u + α ∇_h V(h + u) from u = 0. Kong et al. 2024, arXiv:2406.05954.

    Args:
        step_size: α. Large α · steps costs coherence: the paper's penalty on ‖u‖ is in these two alone.
    """
    moved = hidden.detach().clone()
    with torch.enable_grad():
        for _ in range(steps):
            moved.requires_grad_(True)
            (gradient,) = torch.autograd.grad(value(moved).sum(), moved)
            moved = (moved + step_size * gradient).detach()
    return moved - hidden


class Edited(Decoder):
    """A decoder that moves the last hidden state up a value's gradient before every token; it is an engine.

    Log-probs of its completions are those of the edited distribution.

    Args:
        engine: a transformers engine; vLLM keeps hidden states to itself.
        value: of the last layer's hidden states, such as :func:`~posttrain.decoding.model_scores.head_value` of a value
            model whose backbone is the engine's own model.
        step_size: α; the paper takes 0.2 to 1.
        steps: gradient steps a token; the paper takes 30 to 200.
    """

    engine: TransformersEngine
    alone = True

    def __init__(
        self, engine: TransformersEngine, value: HiddenValue, *, step_size: float = 0.5, steps: int = 30
    ) -> None:
        self.engine, self.value, self.step_size, self.steps = engine, value, step_size, steps

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`."""
        output_layer: Any = self.engine.model.get_output_embeddings()
        hook = output_layer.register_forward_hook(self._edited)
        try:
            return self.engine.generate(prompts, sampling, n, seeds=seeds, on_completion=on_completion)
        finally:
            hook.remove()

    def _edited(self, output_layer: nn.Linear, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        with torch.inference_mode(False):  # gradients need tensors that were made outside of it
            hidden = inputs[0].clone().float()
            moved = edit(hidden, self.value, step_size=self.step_size, steps=self.steps)
        return logits + nn.functional.linear(moved.to(logits), output_layer.weight)
