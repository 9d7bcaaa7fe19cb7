"""Reads from a verifier's signature which dataset columns it asks for, and whether it takes one completion or all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCH_FIRST = ("completions", "prompts")
"""Names of the first parameter of a TRL-style function: ``f(completions, prompts, **columns) -> list``."""

NOT_COLUMNS = frozenset({"completion", "completions", "prompts", "completion_ids", "finish", "prompt_text"})
"""Names of arguments that the pool fills itself, which are no columns of the dataset."""


@dataclass(frozen=True)
class Signature:
    """The call signature of a verifier."""

    batch: bool  # True: TRL's style, lists over the whole batch
    asynchronous: bool
    required: tuple[str, ...]  # parameters without default
    optional: tuple[str, ...]
    all_columns: bool  # True: takes ``**columns``
    not_null: frozenset[str]  # columns whose annotation excludes None

    def takes(self, name: str) -> bool:
        """True if the verifier has a parameter of this name."""
        return name in self.required or name in self.optional

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Selects the columns of a row that the verifier takes."""
        if self.all_columns:
            return {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        return {name: row[name] for name in (*self.required, *self.optional) if name in row and name not in NOT_COLUMNS}


def signature_of(call: Callable[..., Any], options: Mapping[str, Any]) -> Signature:
    """Reads the signature of a function, a ``functools.partial`` or an object with ``__call__``.

    Args:
        call: the verifier.
        options: arguments from the recipe; the signature leaves them out.

    Raises:
        TypeError: if it has no first parameter for the completion.
    """
    bound = set(options)
    while isinstance(call, functools.partial):
        bound |= set(call.keywords)
        call = call.func
    parameters = list(inspect.signature(call).parameters.values())
    if not parameters or parameters[0].kind == inspect.Parameter.KEYWORD_ONLY:
        raise TypeError(f"{call} takes no completion: its first parameter must be `completion`, or TRL's `completions`")
    batch = parameters[0].name in BATCH_FIRST
    columns = [p for p in (parameters if batch else parameters[1:]) if p.kind not in _VARIADIC and p.name not in bound]
    return Signature(
        batch=batch,
        asynchronous=_is_async(call),
        required=tuple(p.name for p in columns if p.default is p.empty),
        optional=tuple(p.name for p in columns if p.default is not p.empty),
        all_columns=any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters),
        not_null=frozenset(p.name for p in columns if _excludes_none(p.annotation)),
    )


def batch_arguments(
    signature: Signature,
    completions: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    filled: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Keyword arguments of a TRL-style function: lists over completions, which are messages if the prompts are.

    Args:
        filled: ``finish`` and ``prompt_text`` of each completion.
    """
    from trl.data_utils import is_conversational  # here, because worker processes have no use for it

    prompts = [row.get("prompt") for row in rows]
    texts: list[Any] = list(completions)
    if rows and is_conversational({"prompt": prompts[0]}):
        texts = [[{"role": "assistant", "content": text}] for text in completions]
    available: dict[str, Any] = {
        name: [row.get(name) for row in rows] for name in (rows[0] if rows else {}) if name not in NOT_COLUMNS
    }
    available.pop("prompt", None)
    available |= {"prompts": prompts, "completions": texts, "completion_ids": [list(ids) for ids in token_ids]}
    if filled:
        available |= {name: [values[name] for values in filled] for name in filled[0]}
    if signature.all_columns:
        return available
    return {name: available[name] for name in (*signature.required, *signature.optional) if name in available}


def _is_async(call: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _excludes_none(annotation: Any) -> bool:
    """True if there is an annotation, as an object or as source text, and it does not allow None."""
    if annotation is inspect.Parameter.empty:
        return False
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return not any(word in text for word in ("None", "Optional", "Any", "object"))
