"""Columns of TRL's formats beside messages: those that the chat template reads, and those that cannot be read here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from posttrain.data.problems import Problems, shown
from posttrain.data.raw_rows import RawRows

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
UNREADABLE = {
    "images": "an image",
    "image": "an image",
    "videos": "a video",
    "video": "a video",
    "audios": "a recording",
    "audio": "a recording",
}
"""Columns of TRL's formats that a language model of texts cannot read, with what is in them."""


def template_arguments(row: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template for a row: the common ones, then those of its own columns.

    ``chat_template_kwargs`` is an object, and ``tools`` a list of JSON schemas; either may be JSON text.

    Args:
        row: columns of the row.
        common: arguments for all rows: the recipe's ``data.template``.
    """
    arguments = dict(common) | (_plain(row.get("chat_template_kwargs")) or {})
    tools = _plain(row.get("tools"))
    return {**arguments, "tools": tools} if tools else arguments


def check_template_columns(source: RawRows, *, rendered: bool) -> None:
    """Checks the columns that the chat template reads beside messages.

    Args:
        source: the rows.
        rendered: whether the chat template renders the prompts.

    Raises:
        DataError: if one of them holds something else, or if there are images or the like, which are not read.
    """
    problems, names = Problems(), source.rows.column_names
    for name in (name for name in UNREADABLE if name in names):
        number = 0
        for rows in source.batches([name]):
            for row in rows:
                if row[name] is not None and row[name] != []:
                    problems.add(source.place(number), _unreadable(name))
                number += 1
    present = [name for name in TEMPLATE_COLUMNS if name in names]
    number = 0
    for rows in source.batches(present) if present else ():
        for row in rows:
            for name in present:
                if problem := _problem(name, row[name], rendered=rendered):
                    problems.add(source.place(number), f"column {name!r} {problem}")
            number += 1
    problems.raise_if_any()


def _unreadable(name: str) -> str:
    return (
        f"column {name!r} holds {UNREADABLE[name]}, and the policy reads text alone: leave such rows out, or name the "
        f"column in `ignore` if the prompt is whole without it"
    )


def _plain(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _problem(name: str, value: Any, *, rendered: bool) -> str | None:
    """Returns what is wrong with a value, as the end of "column 'tools' ..."; None if nothing is."""
    try:
        plain = _plain(value)
    except ValueError as error:
        return f"is {shown(value)}, which is not JSON: {error}"
    if not plain:
        return None
    if not rendered:
        return (
            f"is {shown(plain)}, but the prompts are plain text, which no chat template renders; `ignore` leaves it out"
        )
    if name == "chat_template_kwargs":
        return None if isinstance(plain, dict) else f"is {shown(plain)}; it should be an object of names and values"
    if not isinstance(plain, list):
        return f"is {shown(plain)}; it should be a list of tools, each a JSON schema"
    wrong = next((tool for tool in plain if not isinstance(tool, dict)), None)
    return None if wrong is None else f"holds {shown(wrong)}; each tool should be an object: a JSON schema"
