"""What makes a row fit: its prompt, and the columns that the verifiers ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.problems import Problems, shown
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import suggestion
from posttrain.verify.signature import NOT_COLUMNS, signature_of

if TYPE_CHECKING:
    from posttrain.data.rows import Rows

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")


def prompt_problem(prompt: Any) -> str | None:
    """What keeps a prompt from being text or a list of messages, as the end of the sentence "column 'prompt' ..."."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty text: leave the row out"
    if not isinstance(prompt, list):
        return f"is {shown(prompt)}; it is to be text, or a list of messages with role and content"
    if not prompt:
        return "is an empty list: leave the row out, or put a user's message in it"
    for position, message in enumerate(prompt):
        problem = message_problem(message, position)
        if problem:
            return f"has a message {position + 1} of {len(prompt)} that {problem}"
    if prompt[-1]["role"] not in LAST_ROLES:
        return f"ends with a message of role {prompt[-1]['role']!r}; the last one is to be the user's (or a tool's)"
    return None


def message_problem(message: Any, position: int) -> str | None:
    """What keeps an element of a conversation from being a message, as the end of "a message that ..."."""
    if not isinstance(message, dict):
        return f"is {shown(message)}; it is to be an object with role and content"
    for key in ("role", "content"):
        if message.get(key) is None and not (key == "content" and message.get("tool_calls")):
            others = [name for name, value in message.items() if value is not None]
            return f"has no {key!r}; {suggestion(key, others)}"
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"has the role {role!r}; {suggestion(role, ROLES)}"
    if role in ("system", "developer") and position:
        return f"has the role {role!r}, which only the first message may have"
    if content is not None and not isinstance(content, str | list):
        return f"has the content {shown(content)}; it is to be text"
    return None


def check_columns(rows: Rows, verifiers: Sequence[Part]) -> None:
    """Every column that a verifier asks for is there, and not null where its annotation rules that out.

    Raises:
        DataError: naming the verifier, and the rows that lack a value.
    """
    problems = Problems()
    for part in verifiers:
        signature = signature_of(part.call, part.options)
        for name in signature.required:
            if name in NOT_COLUMNS:
                continue
            if name not in rows.columns:
                copy = f"`columns: {{{name}: <column>}}` copies one, `{name}: ...` in `verify` sets it for all rows"
                asked = f"no column {name!r}, which the verifier {part.name!r} asks for"
                problems.add(rows.source.name, f"{asked}; {suggestion(name, rows.columns)}; {copy}")
            elif name in signature.not_null:
                _check_nulls(rows, name, part.name, problems)
    problems.raise_if_any()


def _check_nulls(rows: Rows, name: str, verifier: str, problems: Problems) -> None:
    for index in np.flatnonzero(rows.column(name).is_null().to_numpy()):
        problems.add(rows.place(int(index)), f"column {name!r} is missing or null; the verifier {verifier!r} needs it")
