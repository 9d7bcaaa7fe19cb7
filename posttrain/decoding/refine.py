"""Refines all tokens of a draft at once, sweep by sweep.

A model that was trained to turn drafts into better ones (DiffPO, Chen et al. 2025, arXiv:2503.04240) edits in few
sweeps. Run to the end, any causal model's sweeps arrive at its own greedy completion, whatever the draft was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

GreedyNext = Callable[[Int[Tensor, "N L"]], Int[Tensor, "N L"]]
"""The most probable token after every prefix of each row: column t is of the prefix that ends with token t."""


def jacobi(
    greedy_next: GreedyNext, prompt: Sequence[int], draft: Sequence[int], *, sweeps: int | None = None
) -> tuple[list[int], int]:
    """Replaces every token of the draft by the most probable one after the tokens before it, until nothing changes.

    y_t <- argmax_a p(a | x, y_<t) for all t at once (Jacobi iteration; Santilli et al. 2023, arXiv:2305.10427). After
    sweep m the first m tokens are those of greedy decoding, so it takes at most as many sweeps as tokens.

    Args:
        sweeps: most sweeps; default: as many as there are tokens.

    Returns:
        The refined draft, and the sweeps that changed it.
    """
    tokens, changed = list(draft), 0
    for _ in range(len(tokens) if sweeps is None else sweeps):
        best = greedy_next(torch.tensor([[*prompt, *tokens]]))[0].tolist()
        refined = best[len(prompt) - 1 : -1]
        if refined == tokens:
            break
        tokens, changed = refined, changed + 1
    return tokens, changed


def model_greedy(model: nn.Module) -> GreedyNext:
    """The most probable next tokens under a Hugging Face language model."""

    @torch.inference_mode()
    def greedy_next(tokens: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
        device = next(model.parameters()).device
        return model(input_ids=tokens.to(device), use_cache=False).logits.argmax(-1)

    return greedy_next
