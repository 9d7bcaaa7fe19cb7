"""Request bodies: the part of OpenAI's API that the server supports, and its extensions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    model_validator,
)
from pydantic import field_validator as field_check
from transformers import PreTrainedTokenizerBase

from posttrain.option_types import LARGEST_COUNT, TEMPERATURES, no_tiny_temperature
from posttrain.serving.neutral import drop_neutral

MAX_CHOICES = 1024
"""Most completions of a request, of all its prompts together."""
MAX_STOPS = 16
"""Most stop strings of a request."""
Number = Annotated[float, Strict()]
Count = Annotated[int, Strict(), Field(ge=1, le=LARGEST_COUNT)]
NonEmpty = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]


RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}
"""Arguments of ``apply_chat_template`` itself, among them another template, which clients must not set."""


def _for_the_template(arguments: dict[str, Any]) -> dict[str, Any]:
    if wrong := sorted(RESERVED & arguments.keys()):
        raise ValueError(f"{wrong[0]!r} is no variable of a chat template; leave it out")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_for_the_template)]


class Body(BaseModel):
    """Base of all bodies. Unknown keys are errors, so that a misspelt setting is not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Guide(Body):
    """Settings of the guide: ``extra_body={"guide": {"strength": 2.0}}``, also written ``{"lambda": 2.0}``."""

    strength: Number | None = Field(default=None, validation_alias=AliasChoices("strength", "lambda"))
    """Strength of the recipe's decoder for this request; 0 samples from the policy without the decoder."""


class StreamOptions(Body):
    """Options of a request that streams."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, Mapping) else body


class SamplingRequest(Body):
    """Settings of both kinds of requests. A setting that is left out is the recipe's."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[Number, AfterValidator(no_tiny_temperature)] | None = Field(
        default=None, ge=0, le=TEMPERATURES[1]
    )
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: StrictInt | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    min_p: Number | None = Field(default=None, ge=0, lt=1)
    n: StrictInt = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[NonEmpty], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[Annotated[StrictInt, Field(ge=0, le=LARGEST_COUNT)]] | None = None
    ignore_eos: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    guide: Guide | StrictBool = True
    """Guide of the request; ``false`` samples from the policy without the decoder."""
    return_token_ids: StrictBool = False
    """Switch that adds ``token_ids`` and ``prompt_token_ids`` to each choice."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        return drop_neutral(body, cls.model_fields) if isinstance(body, Mapping) else body

    @field_check("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _streams(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream: true")
        return self


class CompletionRequest(SamplingRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | Tokens | list[str] | list[Tokens]
    logprobs: StrictInt | None = Field(default=None, ge=0)
    best_of: StrictInt | None = None

    @field_check("prompt", mode="wrap")
    @classmethod
    def _kinds(cls, value: Any, inner: Any) -> Any:
        try:
            prompt = inner(value)
        except ValueError:
            prompt = None
        if prompt is None or prompt == []:
            raise ValueError("should be a string, a list of strings, a list of token ids, or a list of such lists")
        return prompt

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.logprobs is not None and self.logprobs > 1:
            raise ValueError("logprobs: only sampled tokens have log-probs here; use 0 or 1")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: is not supported; the server's decoder may be a best-of-n")
        return self

    @property
    def wants_logps(self) -> bool:
        """True if the answer has the log-probs of tokens."""
        return self.logprobs is not None


class TextPart(Body):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: NonEmpty
    content: str | list[TextPart]
    name: str | None = None
    reasoning_content: str | None = None
    """Reasoning before the content, for chat templates that write it."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_server_writes_it(cls, body: Any) -> Any:
        return drop_neutral(body, cls.model_fields) if isinstance(body, Mapping) else body

    @property
    def text(self) -> str:
        """All words of the message: its role, name, reasoning and content."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return "".join([self.role, self.name or "", self.reasoning_content or "", text])

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it: role, text or text parts, and perhaps a name and reasoning."""
        parts = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        return {"role": self.role, "content": parts} | {
            key: value for key in ("name", "reasoning_content") if (value := getattr(self, key)) is not None
        }


class ChatRequest(SamplingRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def texts(self) -> list[str]:
        """All texts that the chat template writes."""
        arguments = json.dumps(self.chat_template_kwargs, ensure_ascii=False)
        return [*(message.text for message in self.messages), arguments]

    @property
    def wants_logps(self) -> bool:
        """True if the answer has the log-probs of tokens."""
        return bool(self.logprobs)


class ValuesRequest(Body):
    """Body of ``POST /v1/values``: the guide's score of every beginning of a completion of a prompt or of messages."""

    model: str
    prompt: str | Tokens | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    completion: str | Tokens

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        return drop_neutral(body, cls.model_fields) if isinstance(body, Mapping) else body

    @model_validator(mode="after")
    def _one_beginning(self) -> ValuesRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either a prompt or messages")
        return self

    @property
    def texts(self) -> list[str]:
        """All texts that the chat template writes."""
        arguments = json.dumps(self.chat_template_kwargs, ensure_ascii=False)
        return [*(message.text for message in self.messages or ()), arguments]
