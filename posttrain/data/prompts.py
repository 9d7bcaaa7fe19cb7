"""Checks prompts: each is text, or a list of messages."""

from __future__ import annotations

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
        return f"has the content {shown(content)}; it should be text"
    return None
