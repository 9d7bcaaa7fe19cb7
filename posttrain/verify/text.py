"""Verifiers of the completion as a text: its form, its wording, its length."""

from __future__ import annotations

import functools
import re
from typing import Literal

from posttrain.verify.columns import reads

THINK_THEN_ANSWER = r"\s*<think>(?!.*<think>).*?</think>\s*\S.*"


def format(completion: str, *, pattern: str = THINK_THEN_ANSWER, prompt_text: str = "") -> float:
    """1 if the whole completion matches a regular expression (``.`` matches line ends too), else 0.

    The default asks for one ``<think>...</think>`` followed by an answer: DeepSeek-AI 2025, section 2.2.2, 2501.12948.
    A ``<think>`` with which the template ends the prompt belongs to the completion.

    Args:
        prompt_text: the prompt as the model read it; the pool passes it.
    """
    text = f"<think>{completion}" if prompt_text.rstrip().endswith("<think>") else completion
    return float(compiled(pattern).fullmatch(text) is not None)


def format_quick(completion: str, *, pattern: str = THINK_THEN_ANSWER, prompt_text: str = "") -> float | None:
    """Fast version of :func:`format`; ``None`` for any but the default pattern, which may backtrack without end."""
    return format(completion, prompt_text=prompt_text) if pattern == THINK_THEN_ANSWER else None


def exact_text(answer: str | int) -> str:
    """The text of an answer that is compared character by character.

    Raises:
        ValueError: if it is neither text nor a whole number: 72.0 may have been written 72 in the file.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise ValueError(f"answer is {answer!r:.80}; `exact` compares text: write the answer as text")
    return str(answer)


@reads(answer=exact_text)
def exact(completion: str, *, answer: str, strip: bool = True, casefold: bool = False) -> float:
    """1 if the completion is the answer, character by character, else 0."""
    text, target = completion, exact_text(answer)
    if strip:
        text, target = text.strip(), target.strip()
    if casefold:
        text, target = text.casefold(), target.casefold()
    return float(text == target)


def length(
    completion: str,
    *,
    minimum: int = 0,
    maximum: int | None = None,
    margin: int = 0,
    unit: Literal["words", "characters"] = "words",
) -> float:
    """1 if the completion is between ``minimum`` and ``maximum`` units long; falls linearly to 0 over ``margin`` more.

    Raises:
        ValueError: if the unit is unknown, or if the maximum is below the minimum.
    """
    if unit not in ("words", "characters"):
        raise ValueError(f"length: unit is {unit!r}; it must be words or characters")
    if maximum is not None and maximum < minimum:
        raise ValueError(f"length: maximum {maximum} is below minimum {minimum}")
    size = len(completion.split()) if unit == "words" else len(completion)
    excess = max(minimum - size, 0 if maximum is None else size - maximum, 0)
    return max(0.0, 1.0 - excess / (margin + 1))


@functools.lru_cache(maxsize=64)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression, compiled once.

    Raises:
        ValueError: if it is not a regular expression; the message gives the position.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format: pattern {pattern!r} is not a regular expression: {error}") from error
