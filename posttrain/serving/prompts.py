"""Turns requests into token ids and sampling settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from posttrain.engines.base import Sampling
from posttrain.serving.errors import ApiError
from posttrain.serving.protocol import ChatRequest, CompletionRequest, Sampled

Read = Callable[[str], list[int]]


def completion_prompts(request: CompletionRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts of a completion request; token ids are taken as they are.

    Raises:
        ApiError: for ids that are none of the tokenizer's.
    """
    prompt = request.prompt
    several: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return [token_ids(each, tokenizer, "prompt") for each in several]


def token_ids(text: str | list[int], tokenizer: PreTrainedTokenizerBase, param: str, *, special: bool = True) -> Any:
    """The tokens of a text.

    Args:
        special: with the tokens that the tokenizer puts before texts, such as one that begins a sequence.

    Raises:
        ApiError: for ids that are none of the tokenizer's.
    """
    if isinstance(text, str):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]
    if max(text) >= len(tokenizer):
        raise ApiError(400, f"{param}: token {max(text)} is none of the {len(tokenizer)} that there are", param=param)
    return text


def chat_prompt(request: ChatRequest, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The conversation rendered by the tokenizer's chat template, as in training.

    Raises:
        ApiError: without a template, or for a conversation that it refuses.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, "messages: this model's tokenizer has no chat template; use /v1/completions")
    messages = [message.for_template for message in request.messages]
    try:
        written = apply_chat_template({"prompt": messages}, tokenizer, **request.chat_template_kwargs)["prompt"]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from error
    return token_ids(written, tokenizer, "messages", special=False)


def sampling_for(request: Sampled, default: Sampling, prompts: Sequence[Sequence[int]], room: int) -> Sampling:
    """Sampling settings of a request; settings that it does not give are the recipe's.

    Args:
        room: most tokens of a prompt and its completion together.

    Raises:
        ApiError: for a prompt that leaves too little room.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise ApiError(400, "prompt: is empty: a model needs at least one token to continue", param="prompt")
    wanted = request.max_tokens or 1
    if longest + wanted > room:
        raise ApiError(
            400,
            f"This model's maximum context length is {room} tokens: the prompt has {longest}, "
            f"and max_tokens {wanted} more are wanted",
            param="max_tokens" if longest < room else "messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )

    def chosen(name: str) -> Any:
        given = getattr(request, name)
        return getattr(default, name) if given is None else given

    return Sampling(
        temperature=chosen("temperature"),
        top_p=chosen("top_p"),
        top_k=chosen("top_k"),
        min_p=chosen("min_p"),
        max_tokens=request.max_tokens or min(default.max_tokens, room - longest),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
    )
