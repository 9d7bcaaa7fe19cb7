"""Checks of prompts and shapers that engines make before the first token."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.engines.base import RefusedRequest, Sampling, Shaper
from posttrain.option_types import LARGEST_COUNT, TEMPERATURES


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int) -> None:
    """Raises ``RefusedRequest`` for the first prompt that is empty or leaves no room for ``max_tokens``."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise RefusedRequest(f"prompt {index} is empty: a model needs at least one token to continue", index)
        if len(prompt) + max_tokens > max_model_len:
            raise RefusedRequest(
                f"prompt {index} has {len(prompt)} tokens: with max_tokens {max_tokens} that is more than "
                f"max_model_len {max_model_len}",
                index,
            )


def settings_problem(sampling: Sampling) -> str | None:
    """Returns what is wrong with settings of sampling that no engine can take; None if nothing is."""
    low, high = TEMPERATURES
    ranges = [
        ("temperature", "0, or from 0.01 to 2", sampling.temperature == 0 or low <= sampling.temperature <= high),
        ("top_p", "above 0 and at most 1", 0 < sampling.top_p <= 1),
        ("top_k", f"from 0 to {LARGEST_COUNT}", 0 <= sampling.top_k <= LARGEST_COUNT),
        ("min_p", "at least 0 and below 1", 0 <= sampling.min_p < 1),
        ("max_tokens", f"from 1 to {LARGEST_COUNT}", 1 <= sampling.max_tokens <= LARGEST_COUNT),
        (
            "stop_token_ids",
            f"from 0 to {LARGEST_COUNT}",
            all(0 <= token <= LARGEST_COUNT for token in sampling.stop_token_ids),
        ),
    ]
    wrong = next(((name, range_) for name, range_, fits in ranges if not fits), None)
    return wrong and f"{wrong[0]}: should be {wrong[1]}; it is {getattr(sampling, wrong[0])}"


def check_settings(sampling: Sampling) -> None:
    """Raises ``RefusedRequest`` for settings that no engine can take."""
    if (problem := settings_problem(sampling)) is not None:
        raise RefusedRequest(problem)


def check_vocabulary(prompts: Sequence[Sequence[int]], size: int | None) -> None:
    """Raises ``RefusedRequest`` for the first prompt with a token that the model does not have.

    Args:
        size: number of tokens of the model; None if it is not known.
    """
    for index, prompt in enumerate(prompts):
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        if wrong < 0 or (size is not None and wrong >= size):
            raise RefusedRequest(f"prompt {index} has token {wrong}; the model has {size} tokens", index)


def check_shaper(shaper: Shaper | None, sampling: Sampling) -> None:
    """Raises ``RefusedRequest`` for a shaper together with filters, which engines apply in different orders."""
    if shaper is not None and sampling.temperature > 0 and not sampling.is_full_softmax:
        raise RefusedRequest(
            f"top_p {sampling.top_p}, top_k {sampling.top_k}, min_p {sampling.min_p}: filters cannot be combined "
            "with a shaper; leave them out and restrict the shaper's candidates"
        )


def stop_ids(sampling: Sampling, eos: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that end a completion."""
    return sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *eos)
