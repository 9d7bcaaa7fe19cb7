"""The endpoint for values: the guide's score of every beginning of a completion."""

from __future__ import annotations

import asyncio
from typing import Any

from posttrain.decoding.prefixes import Prefix, PrefixScore
from posttrain.models.text import text_of
from posttrain.serving.errors import ApiError, server_error
from posttrain.serving.prompts import chat_prompt, token_ids
from posttrain.serving.protocol import ValuesRequest
from posttrain.serving.routing import Served
from posttrain.system.files import json_number

AT_ONCE = 64  # number of prefixes that are scored together


async def prefix_values(served: Served, request: ValuesRequest) -> dict[str, Any]:
    """Computes the value before the completion and after each of its tokens, in reward units.

    Raises:
        ApiError: if there is no guide with a score, or if there are too many tokens.
    """
    score: Any = getattr(served.decoder, "score", None)
    if not isinstance(score, PrefixScore):
        raise ApiError(400, "this server has no score of prefixes, because its recipe has no decoder with one")
    prompt, completion = await asyncio.to_thread(_tokens, served, request)
    whole, room = [*prompt, *completion], served.engine.max_model_len
    if not prompt or len(whole) > room:
        message = f"prompt and completion have {len(prompt)} and {len(completion)} tokens; the server takes 1 to {room}"
        raise ApiError(400, message, param="completion" if prompt else "prompt", code="context_length_exceeded")
    prefixes = [Prefix(tokens=whole[:end], start=len(prompt)) for end in range(len(prompt), len(whole) + 1)]
    values: list[float] = []
    for start in range(0, len(prefixes), AT_ONCE):
        values += await _scored(served, score, prefixes[start : start + AT_ONCE])
    decode = text_of(served.tokenizer, special=True)
    return {
        "object": "values",
        "model": request.model,
        "tokens": [decode([token]) for token in completion],
        "values": [json_number(value) for value in values],
        "kind": score.kind,
        "beta": score.beta,
    }


def _tokens(served: Served, request: ValuesRequest) -> tuple[list[int], list[int]]:
    """Token ids of the beginning and of the completion."""
    if request.messages is not None:
        served.check_texts(request.texts, "messages")
        prompt = chat_prompt(request, served.tokenizer)
    else:
        assert request.prompt is not None  # the body has one of the two
        served.check_texts(request.prompt, "prompt")
        prompt = token_ids(request.prompt, served.tokenizer, "prompt")
    served.check_texts(request.completion, "completion")
    return prompt, token_ids(request.completion, served.tokenizer, "completion", special=False)


async def _scored(served: Served, score: PrefixScore, prefixes: list[Prefix]) -> list[float]:
    """Scores prefixes in the worker's thread, which alone may use the engine and its guide."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[list[float]] = loop.create_future()

    def settle(values: list[float] | Exception) -> None:
        if result.done():
            return
        if isinstance(values, Exception):
            result.set_exception(server_error(values))
        else:
            result.set_result(values)

    def work() -> None:
        try:
            values: list[float] | Exception = score.score(prefixes).tolist()
        except Exception as error:  # reported to the client by `settle`
            values = error
        loop.call_soon_threadsafe(settle, values)

    served.worker.call(work)
    return await result
