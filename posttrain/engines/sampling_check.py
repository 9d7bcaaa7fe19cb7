"""Compares what an engine samples with whole forward passes of its model, when the engine starts.

A family whose layers keep other things than keys and values (recurrent ones), or that ignores the cache, would be
sampled from wrongly, or fail at the first prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from posttrain.engines.base import Engine, Sampling
from posttrain.errors import RecipeError

LARGEST = 1e-3
"""Largest difference of a log-prob in float32, in nats."""

LARGEST_MEAN = 0.1
"""Largest mean difference in other dtypes."""

TOKENS = 3
"""Number of tokens that are sampled from each of two prompts."""


@torch.no_grad()
def check_sampling(engine: Engine, model: Any, room: int, failure: Callable[[], Exception | None]) -> None:
    """Samples from prompts of two lengths, of which one is padded, and compares log-probs.

    Args:
        engine: the engine, with the weights of ``model``.
        model: the Hugging Face model.
        room: most tokens of a prompt and its completion; the check is left out if there is no room for it.
        failure: gives the error of a round that failed and was repeated request by request; None if none did.

    Raises:
        RecipeError: if the engine fails or its log-probs are not the model's; names the family.
    """
    vocabulary, longest = model.config.get_text_config().vocab_size, min(6, room - TOKENS)
    if longest < 2:
        return
    tokens = [(vocabulary // 3 + 7 * i) % vocabulary for i in range(longest)]
    prompts, family = [tokens, tokens[longest // 2 :]], type(model).__name__
    try:
        completions = engine.generate(prompts, Sampling(max_tokens=TOKENS, ignore_eos=True), n=2, seeds=[1, 2])
    except Exception as error:
        raise _refused(family, f"sampling fails: {type(error).__name__}: {error}") from error
    if (error := failure()) is not None:
        raise _refused(family, f"sampling fails: {type(error).__name__}: {error}") from error
    differences = []
    for prompt, samples in zip(prompts, completions, strict=True):
        for completion in samples:
            ids = torch.tensor([[*prompt, *completion.tokens]], device=model.device)
            table = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            chosen = table.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()
            differences.append((chosen - torch.tensor(completion.logps)).abs())
    difference, exact = torch.cat(differences), model.dtype == torch.float32
    measured = float(difference.max() if exact else difference.mean())
    if not measured <= (LARGEST if exact else LARGEST_MEAN):  # NaN too
        raise _refused(family, f"log-probs of sampled tokens differ from whole forward passes by {measured:.2g} nats")


def _refused(family: str, reason: str) -> RecipeError:
    return RecipeError(
        f"engine.use: transformers: {family}: {reason}. This engine samples from families whose layers keep keys and "
        "values of every token (docs/families.md); set engine.use: vllm, or take a model of another family"
    )
