"""Memory that a forward pass keeps for its backward pass, measured on a few tokens of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LENGTH = 16
"""Length of the shorter rows of the measurement, in tokens."""


class Activations(NamedTuple):
    """Bytes that a forward pass keeps, by the number and the length of its rows."""

    fixed: float  # whatever the batch, such as weights that autocast has rounded
    per_token: float
    per_pair: float  # of two tokens of a row: attention weights, where the kernel keeps them
    layers: int
    per_token_between: float  # hidden states between two layers, for each token

    def kept(self, rows: int, columns: int, *, checkpointing: bool = False) -> float:
        """Bytes at the peak of a backward pass through ``rows`` rows of ``columns`` tokens.

        To what the forward pass keeps comes what the backward pass of one layer holds at a time, about as much as the
        layer keeps. With gradient checkpointing the forward pass keeps the hidden states between the layers alone, and
        the backward pass computes the rest again, layer by layer (1.25 of a layer's, as measured).
        """
        whole = rows * columns * (self.per_token + self.per_pair * columns)
        of_layer = whole / self.layers
        if checkpointing:
            return self.fixed + rows * columns * self.per_token_between * self.layers + 1.25 * of_layer
        return self.fixed + whole + of_layer


def measure_activations(
    model: nn.Module,
    hidden_of: Callable[[Tensor], Tensor],
    config: Any,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Activations:
    """Measures what a model keeps for its backward pass, on four batches of up to 64 tokens.

    The sizes are linear in the number of rows, and quadratic in their length where attention weights are kept:
    ``fixed(L) + N (a L + b L^2)``; four batches of ``N`` in {1, 2} and ``L`` in {16, 32} give a and b.

    Args:
        model: the module whose parameters and buffers are not counted; it is set to evaluation mode, in which nothing
            is checkpointed.
        hidden_of: function from token ids ``[N, L]`` to the last hidden states.
        config: the model's configuration.
        precision: makes the context of a forward pass, such as autocast.
    """
    text = config.get_text_config()
    short = max(1, min(LENGTH, (getattr(text, "max_position_embeddings", None) or 2 * LENGTH) // 2))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(text.vocab_size // 10, text.vocab_size // 2, (2, 2 * short), generator=generator).to(device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    try:
        sizes = {
            (rows, columns): _kept_bytes(hidden_of, tokens[:rows, :columns], own, precision)
            for rows in (1, 2)
            for columns in (short, 2 * short)
        }
        with torch.no_grad(), precision():
            between = hidden_of(tokens[:1, :1])
    finally:
        for module, mode in modes:
            module.training = mode
    first, second = (sizes[2, columns] - sizes[1, columns] for columns in (short, 2 * short))
    per_pair = max(0.0, (second - 2 * first) / (2 * short**2))
    per_token = first / short - per_pair * short
    fixed = max(0.0, sizes[1, short] - first)
    return Activations(fixed, per_token, per_pair, getattr(text, "num_hidden_layers", 1), between.nbytes)


def _kept_bytes(
    hidden_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    own: set[int],
    precision: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Bytes of all memory but the model's own that autograd keeps in one forward pass; shared memory counts once."""
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory  # held, so that no later tensor gets the same address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision():
        hidden_of(tokens)
        return sum(memory.nbytes() for memory in kept.values())
