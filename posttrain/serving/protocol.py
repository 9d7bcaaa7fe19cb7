"""Request bodies: the part of OpenAI's API that the server supports, and its extensions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

MAX_STOPS = 16
"""Most stop strings of a request."""
NonEmpty = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]


class Strict(BaseModel):
    """Base of all bodies. Unknown keys are errors, so that a misspelt setting is not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Guide(Strict):
    """Settings of the guide: ``extra_body={"guide": {"strength": 2.0}}``, also written ``{"lambda": 2.0}``."""

    strength: float | None = Field(default=None, validation_alias=AliasChoices("strength", "lambda"))
    """Strength of the recipe's decoder for this request; 0 samples from the policy without the decoder."""


class StreamOptions(Strict):
    """Options of a request that streams."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingRequest(Strict):
    """Settings of both kinds of requests. A setting that is left out is the recipe's."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, lt=1)
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = None
    stop: Annotated[list[NonEmpty], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    guide: Guide | bool = True
    """Guide of the request; ``false`` samples from the policy without the decoder."""
    return_token_ids: bool = False
    """Switch that adds ``token_ids`` and ``prompt_token_ids`` to each choice."""

    user: str | None = None
    """Id of the client's user; accepted without effect, like ``metadata`` and ``store``."""
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported: it would change the distribution that log-probs refer to. Leave it out")
        return value

    @model_validator(mode="after")
    def _streams(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream: true")
        return self


class CompletionRequest(SamplingRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | Tokens | list[str] | list[Tokens]
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="wrap")
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
        if self.echo:
            raise ValueError("echo: is not supported; with return_token_ids: true the reply has prompt_token_ids")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: is not supported; the server's decoder may be a best-of-n")
        if self.suffix:
            raise ValueError("suffix: is not supported: the policy writes from left to right")
        return self

    @property
    def wants_logps(self) -> bool:
        """True if the answer has the log-probs of tokens."""
        return self.logprobs is not None


class TextPart(Strict):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: NonEmpty
    content: str | list[TextPart]
    name: str | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it: role, text or text parts, and perhaps a name."""
        parts = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        return {"role": self.role, "content": parts} | ({} if self.name is None else {"name": self.name})


class ChatRequest(SamplingRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        if self.top_logprobs:
            raise ValueError("top_logprobs: only sampled tokens have log-probs here; leave it out")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: only {'type': 'text'} is supported")
        if self.tools:
            raise ValueError("tools: are not supported")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def wants_logps(self) -> bool:
        """True if the answer has the log-probs of tokens."""
        return bool(self.logprobs)


class ValuesRequest(Strict):
    """Body of ``POST /v1/values``: the guide's score of every beginning of a completion."""

    model: str
    prompt: str | Tokens
    completion: str | Tokens
