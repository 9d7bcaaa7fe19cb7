"""Arguments of OpenAI's API that the server accepts as long as they ask for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Neutral(NamedTuple):
    """An argument without effect."""

    values: tuple[Any, ...]  # values, beside null, that ask for nothing
    refusal: str  # the sentence for other values
    takes: Callable[[Any], bool] = lambda value: False  # tells further values that ask for nothing


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


DISTRIBUTION = "is not supported: it would change the distribution that log-probs refer to. Leave it out"
TOOLS = "is not supported: this server has no tool calls. Leave it out"
TEXT_ONLY = "is not supported: this server reads and writes text alone. Leave it out"
SETTING = "is not supported: this server has no such setting. Leave it out"

NEUTRAL: dict[str, Neutral] = {
    "presence_penalty": Neutral((0, 0.0), DISTRIBUTION),
    "frequency_penalty": Neutral((0, 0.0), DISTRIBUTION),
    "logit_bias": Neutral(({},), DISTRIBUTION),
    "top_logprobs": Neutral((0,), "only sampled tokens have log-probs here; leave it out"),
    "echo": Neutral((False,), "is not supported; with return_token_ids: true the reply has prompt_token_ids"),
    "suffix": Neutral(("",), "is not supported: the policy writes from left to right"),
    "user": Neutral((), "should be a string", _is_text),
    "safety_identifier": Neutral((), "should be a string", _is_text),
    "prompt_cache_key": Neutral((), "should be a string", _is_text),
    "metadata": Neutral((), "should be an object", lambda value: isinstance(value, dict)),
    "store": Neutral((False,), "is not supported: this server stores no answers. Leave it out"),
    "service_tier": Neutral(("auto", "default"), "is not supported: this server has one tier, 'default'"),
    "prompt_cache_retention": Neutral(("in_memory",), "is not supported: cached prompts stay in memory"),
    "prompt_cache_options": Neutral(({},), SETTING),
    "response_format": Neutral(({"type": "text"},), "only {'type': 'text'} is supported"),
    "tools": Neutral(([],), TOOLS),
    "tool_choice": Neutral(("auto", "none"), TOOLS),
    "parallel_tool_calls": Neutral((True, False), TOOLS),
    "functions": Neutral(([],), TOOLS),
    "function_call": Neutral(("auto", "none"), TOOLS),
    "modalities": Neutral((["text"],), TEXT_ONLY),
    "audio": Neutral((), TEXT_ONLY),
    "prediction": Neutral((), SETTING),
    "moderation": Neutral((), SETTING),
    "web_search_options": Neutral((), SETTING),
    "reasoning_effort": Neutral((), SETTING + ", or set chat_template_kwargs"),
    "verbosity": Neutral(("medium",), SETTING),
    "refusal": Neutral((), "is not supported: chat templates have no place for it. Write it as content"),
    "annotations": Neutral(([],), "is not supported: chat templates have no place for it. Leave it out"),
    "tool_calls": Neutral(([],), TOOLS),
    "tool_call_id": Neutral((), TOOLS),
}
"""Arguments of requests and keys of messages, by name."""


def drop_neutral(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Takes arguments that ask for nothing out of a body: nulls, and the values in ``NEUTRAL``.

    OpenAI's clients send nulls and defaults, and send back the messages that the server wrote, with all of their keys.

    Args:
        fields: fields of the body, by name. A field that must be there stays, so that a null is an error.

    Raises:
        ValueError: if an argument of ``NEUTRAL`` asks for something.
    """
    kept = {}
    for name, value in body.items():
        field, neutral = fields.get(name), NEUTRAL.get(name)
        if value is None and (neutral is not None or (field is not None and not field.is_required())):
            continue
        if field is None and neutral is not None:
            if not any(_equal(value, other) for other in neutral.values) and not neutral.takes(value):
                raise ValueError(f"{name}: {neutral.refusal}")
            continue
        kept[name] = value
    return kept


def _equal(value: Any, other: Any) -> bool:
    """Equality that tells truth values from numbers, and other types from one another."""
    return type(value) is type(other) and value == other
