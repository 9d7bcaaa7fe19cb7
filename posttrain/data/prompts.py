"""Checks prompts: each is text, or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.problems import shown
from posttrain.recipe.yaml_reader import suggestion

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")


def prompt_problem(prompt: Any) -> str | None:
    """Returns what is wrong with a prompt, as the end of the sentence "column 'prompt' ..."; None if nothing is."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty text: leave the row out"
    if not isinstance(prompt, list):
        return f"is {shown(prompt)}; it should be text, or a list of messages with role and content"
    if not prompt:
        return "is an empty list: leave the row out, or put a user's message in it"
    for position, message in enumerate(prompt):
        problem = message_problem(message, position)
        if problem:
            return f"has a message {position + 1} of {len(prompt)} that {problem}"
    if prompt[-1]["role"] not in LAST_ROLES:
        return f"ends with a message of role {prompt[-1]['role']!r}; the last one should be the user's (or a tool's)"
    return None


def message_problem(message: Any, position: int) -> str | None:
    """Returns what is wrong with a message, as the end of "a message that ..."; None if nothing is.

    Args:
        position: index of the message in the conversation.
    """
    if not isinstance(message, dict):
        return f"is {shown(message)}; it should be an object with role and content"
    for key in ("role", "content"):
        if message.get(key) is None and not (key == "content" and message.get("tool_calls")):
            keys = [name for name, value in message.items() if value is not None]
            return f"has no {key!r}; {suggestion(key, keys)}"
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"has the role {role!r}; {suggestion(role, ROLES)}"
    if role in ("system", "developer") and position:
        return f"has the role {role!r}, which only the first message may have"
    if content is not None and not isinstance(content, str | list):
        return f"has the content {shown(content)}; it should be text, or a list of text parts"
    for part in content if isinstance(content, list) else ():
        if problem := part_problem(part):
            return f"has a content that {problem}"
    return _weight_problem(message)


def part_problem(part: Any) -> str | None:
    """Returns what is wrong with a part of a message's content, as the end of "a content that ..."; None if nothing is.

    Only parts such as ``{"type": "text", "text": "Hello"}`` can be read.
    """
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return f'holds {shown(part)}; each part should be an object such as {{"type": "text", "text": "Hello"}}'
    if part["type"] != "text":
        return f"holds a part of type {part['type']!r}; the policy reads text alone"
    if not isinstance(part.get("text"), str):
        return f"holds a text part without its text: {shown(part)}"
    extra = [key for key, value in part.items() if key not in ("type", "text") and value is not None]
    return f"holds a text part with {extra[0]!r}, which nothing reads" if extra else None


def _weight_problem(message: Mapping[str, Any]) -> str | None:
    """Checks ``weight``: 1 says that an assistant's message is learned, as without it, and 0 that it is not."""
    weight = message.get("weight")
    if weight is None or weight in (0, 1):
        asks = bool(weight) and message["role"] != "assistant"
        return "has a weight of 1, but only the assistant's messages are learned" if asks else None
    return f"has the weight {shown(weight)}; it is 1 (learned) or 0 (not learned)"
