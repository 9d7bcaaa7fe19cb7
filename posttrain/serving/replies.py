"""Answers in OpenAI's format, for whole completions and for pieces of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.batch import Finish
from posttrain.engines.base import Completion, RequestUpdate
from posttrain.serving.protocol import ChatRequest, CompletionRequest
from posttrain.serving.text import INCOMPLETE, TextStream

FINISH = {Finish.STOPPED: "stop", Finish.LENGTH: "length"}

GenerationRequest = CompletionRequest | ChatRequest


@dataclass
class Choice:
    """One completion while it is sampled, and its pieces that have not been sent yet."""

    index: int  # index in the answer
    prompt: Sequence[int]
    text: TextStream
    piece: str = ""
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the text before each token
    count: int = 0  # number of tokens of the whole completion so far
    finish: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def take(self, update: RequestUpdate) -> None:
        """Adds the tokens of an update, up to a stop string."""
        for token, logp in zip(update.tokens, update.logps, strict=True):
            if self.finish is not None:
                return
            self.offsets.append(self.text.length)
            self.tokens.append(token)
            self.logps.append(logp)
            self.count += 1
            self.piece += self.text.add(token)
            if self.text.stopped:
                self.finish = "stop"
        if update.completion is not None and self.finish is None:
            self._end(update.completion)

    def _end(self, completion: Completion) -> None:
        self.piece += self.text.finish()
        self.finish = "stop" if self.text.stopped else FINISH.get(completion.finish, "abort")
        self.measured = {name: value for name, value in completion.measured.items() if math.isfinite(value)}

    def sent(self) -> None:
        """Forgets the text and tokens that have just been sent to the client."""
        self.piece = ""
        self.tokens, self.logps, self.offsets = [], [], []


@dataclass(frozen=True)
class Writer:
    """Writes the answers to one request.

    Args:
        request: the request.
        token_text: function from a token to its text.
        number: id of the answer, without its prefix.
        created: time of the request, in seconds since 1970.
    """

    request: GenerationRequest
    token_text: Callable[[int], str]
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def _chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def whole(self, choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Returns the answer to a request that does not stream."""
        kind = "chat.completion" if self._chat else "text_completion"
        entries = [self._whole_choice(choice) for choice in choices]
        return {**self._head(kind), "choices": entries, "usage": usage(choices, prompts)}

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """Returns the first event of a chat stream, with the role; None for other streams."""
        if not self._chat:
            return None
        return self._chunk([self._choice(choice, delta={"role": "assistant", "content": ""}, logprobs=None)])

    def piece(self, choice: Choice) -> dict[str, Any]:
        """Returns an event with the new part of a choice."""
        text = {"delta": {"content": choice.piece} if choice.piece else {}} if self._chat else {"text": choice.piece}
        return self._chunk([self._choice(choice, **text, logprobs=self._logprobs(choice))])

    def last(self, choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Returns the last event, with the token counts."""
        return {**self._chunk([]), "usage": usage(choices, prompts)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.request.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        options = self.request.stream_options
        usage_field = {"usage": None} if options is not None and options.include_usage else {}
        return {**self._head(kind), "choices": choices, **usage_field}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.piece, "refusal": None}
        text = {"message": message} if self._chat else {"text": choice.piece}
        return self._choice(choice, **text, logprobs=self._logprobs(choice))

    def _choice(self, choice: Choice, **content: Any) -> dict[str, Any]:
        extensions: dict[str, Any] = {}
        if self.request.return_token_ids:
            extensions = {"token_ids": choice.tokens, "prompt_token_ids": list(choice.prompt)}
        if choice.measured:
            extensions["measured"] = dict(choice.measured)
        return {"index": choice.index, **content, "finish_reason": choice.finish, **extensions}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self.request.wants_logps:
            return None
        texts = [self.token_text(token) for token in choice.tokens]
        logps = [max(logp, -9999.0) for logp in choice.logps]  # OpenAI's number for minus infinity, which JSON lacks
        if self._chat:
            tokens = zip(texts, logps, strict=True)
            return {"content": [_chat_token(*token) for token in tokens], "refusal": None}
        return {"tokens": texts, "token_logprobs": logps, "top_logprobs": None, "text_offset": choice.offsets}


def _chat_token(text: str, logp: float) -> dict[str, Any]:
    octets = None if INCOMPLETE in text else list(text.encode())  # the bytes of an incomplete character are unknown
    return {"token": text, "logprob": logp, "bytes": octets, "top_logprobs": []}


def usage(choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, int]:
    """Counts tokens: each prompt once, and all completions."""
    prompt_tokens, completion_tokens = sum(map(len, prompts)), sum(choice.count for choice in choices)
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
