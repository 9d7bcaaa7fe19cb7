"""Checks of prompts and shapers that engines make before the first token."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.engines.base import Sampling, Shaper


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int) -> None:
    """Raises ``ValueError`` for the first prompt that is empty or leaves no room for ``max_tokens``."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: a model needs at least one token to continue")
        if len(prompt) + max_tokens > max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens: with max_tokens {max_tokens} that is more than "
                f"max_model_len {max_model_len}"
            )


def check_shaper(shaper: Shaper | None, sampling: Sampling) -> None:
    """Raises ``ValueError`` for a shaper together with filters, which engines apply in different orders."""
    if shaper is not None and sampling.temperature > 0 and not sampling.is_full_softmax:
        raise ValueError(
            f"top_p {sampling.top_p}, top_k {sampling.top_k}, min_p {sampling.min_p}: filters cannot be combined "
            "with a shaper; leave them out and restrict the shaper's candidates"
        )


def stop_ids(sampling: Sampling, eos: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that end a completion."""
    return sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *eos)
