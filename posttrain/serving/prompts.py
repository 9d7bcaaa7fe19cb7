"""Turns requests into token ids and sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.data.arrow import has_half_surrogate
from posttrain.engines.base import Sampling
from posttrain.models.chat_template import REFUSALS, refusal, render
from posttrain.models.token_ids import continuations, prompt_ids
from posttrain.serving.errors import ApiError
from posttrain.serving.protocol import ChatRequest, CompletionRequest, SamplingRequest, ValuesRequest


def completion_prompts(request: CompletionRequest, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the token ids of the prompts of a completion request; prompts that are token ids stay as they are.

    Raises:
        ApiError: if a token id is not in the tokenizer's vocabulary.
    """
    prompt = request.prompt
    prompts: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return [token_ids(text, tokenizer, "prompt") for text in prompts]


def token_ids(text: str | list[int], tokenizer: PreTrainedTokenizerBase, param: str, *, special: bool = True) -> Any:
    """Returns the token ids of a text, as in training; token ids stay as they are.

    Args:
        param: key of the request, for messages.
        special: the text is a prompt, which begins with the tokens that the tokenizer puts before texts, such as one
            that begins a sequence, whether it has them itself or not. Otherwise it continues a prompt.

    Raises:
        ApiError: if the text is not Unicode, or if a token id is not in the tokenizer's vocabulary.
    """
    if isinstance(text, str):
        _check_unicode(text, param)
        return prompt_ids([text], tokenizer)[0].ids if special else continuations([text], tokenizer)[0].ids
    if max(text) >= len(tokenizer):
        raise ApiError(
            400, f"{param}: token {max(text)} is not in the vocabulary of {len(tokenizer)} tokens", param=param
        )
    return text


def chat_prompt(request: ChatRequest | ValuesRequest, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Renders a conversation with the tokenizer's chat template, as in training.

    Raises:
        ApiError: if there is no template, or if the template refuses or leaves out something of the conversation.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, "messages: this model's tokenizer has no chat template; use /v1/completions")
    messages = [message.for_template for message in request.messages or ()]
    try:
        text = render(messages, tokenizer, request.chat_template_kwargs, generate=True)
    except REFUSALS as error:
        raise ApiError(400, f"messages: {refusal(error)}", param="messages") from error
    _check_unicode(text, "messages")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _check_unicode(text: str, param: str) -> None:
    if has_half_surrogate(text):
        raise ApiError(400, f"{param}: holds half of a surrogate pair, which is no character", param=param)


def sampling_for(request: SamplingRequest, default: Sampling, prompts: Sequence[Sequence[int]], room: int) -> Sampling:
    """Makes the sampling settings of a request; settings that it leaves out are the recipe's.

    Args:
        default: settings of the recipe.
        room: most tokens of a prompt and its completion together.

    Raises:
        ApiError: if a prompt is empty or leaves too little room.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise ApiError(400, "prompt: it is empty, and a model needs at least one token to continue", param="prompt")
    least = request.max_tokens or 1
    if longest + least > room:
        raise ApiError(
            400,
            f"This model's maximum context length is {room} tokens: the prompt has {longest}, "
            f"and max_tokens asks for {least} more",
            param="max_tokens" if longest < room else "messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )

    def chosen(name: str) -> Any:
        value = getattr(request, name)
        return getattr(default, name) if value is None else value

    return Sampling(
        temperature=chosen("temperature"),
        top_p=chosen("top_p"),
        top_k=chosen("top_k"),
        min_p=chosen("min_p"),
        max_tokens=request.max_tokens or min(default.max_tokens, room - longest),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
    )
