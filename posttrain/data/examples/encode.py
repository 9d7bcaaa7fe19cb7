"""Encodes dataset completions as the token ids that the policy would have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Finish
from posttrain.data.examples.turns import encode_turns, without_end
from posttrain.data.problems import Problems, shown
from posttrain.data.prompts import message_problem
from posttrain.data.rows import Rows
from posttrain.errors import DataError
from posttrain.models.chat_template import REFUSALS, render
from posttrain.models.token_ids import Continuation, continuations, ended, ends_after, stop_of

CHUNK = 1000  # number of rows that are tokenised at a time


@dataclass(frozen=True, slots=True)
class RawCompletion:
    """A completion to encode, from a column of ``rows[index]``."""

    index: int  # number of the row in Rows
    completion: Any  # text, or messages
    finish: Finish
    column: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompt and completion as token ids."""

    tokens: np.ndarray  # int32 [length]
    mask: np.ndarray  # bool [length]
    starts: np.ndarray | None  # int [chosen tokens]: start of each in the completion's text; None for many turns


def completion_problem(completion: Any, prompt: Any) -> str | None:
    """Returns what is wrong with a completion, as the end of "column 'completion' ..."; None if nothing is."""
    if isinstance(completion, str):
        return None if completion else "is empty text: leave the row out"
    if not isinstance(completion, list):
        return f"is {shown(completion)}; it should be text, or a list of messages with role and content"
    if not completion:
        return "is an empty list: leave the row out"
    if isinstance(prompt, str):
        return "is a list of messages, but the prompt is plain text: write both as messages, or both as text"
    for position, message in enumerate(completion):
        if problem := message_problem(message, position):
            return f"has a message {position + 1} of {len(completion)} that {problem}"
    for verb, message in (("begins", completion[0]), ("ends", completion[-1])):
        if message["role"] != "assistant":
            return f"{verb} with a message of role {message['role']!r}; it should be the assistant's"
    if not any(message.get("weight", 1) for message in completion if message["role"] == "assistant"):
        return "has no message of the assistant to learn (`weight: 0`): leave the row out"
    return None


def encode(rows: Rows, raw: Sequence[RawCompletion], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Encodes prompts with their completions as token ids.

    A text counts as the policy's own words: the prompt's ids, the text's ids, and the token at which sampling stops if
    it ended: the one with which the chat template ends a turn, or the tokenizer's end of sequence after a plain prompt.
    One assistant's message is encoded as the chat template writes it after the prompt, up to that token. Among several
    messages the assistant's are the policy's words, each with its end, but for those with ``weight: 0``. The template's
    generation markers say which tokens these are; if it has none, those of TRL's template for the same family of
    models.

    Args:
        rows: rows with tokenised prompts.
        raw: the completions.

    Raises:
        DataError: if a row cannot be encoded; the message names each such row.
    """
    problems, encoded = Problems(), []
    for start in range(0, len(raw), CHUNK):
        encoded += _encode_chunk(rows, raw[start : start + CHUNK], tokenizer, problems)
    problems.raise_if_any()
    return encoded


def _encode_chunk(
    rows: Rows, chunk: Sequence[RawCompletion], tokenizer: PreTrainedTokenizerBase, problems: Problems
) -> Iterator[Encoded]:
    texts: list[str | None] = []
    for raw in chunk:
        place = f"column {raw.column!r}"
        prompt = rows[raw.index]["prompt"]
        try:
            if problem := completion_problem(raw.completion, prompt):
                raise ValueError(f"{place} {problem}")
            texts.append(_text_after(prompt, raw.completion, tokenizer, rows.template_arguments(raw.index), place))
        except REFUSALS as error:
            problems.add(rows.place(raw.index), str(error))
            texts.append("")
    try:
        tokenised = iter(continuations([text for text in texts if text is not None], tokenizer))
    except ValueError as error:
        raise DataError(f"examples: {error}") from None
    for raw, text in zip(chunk, texts, strict=True):
        prompt_ids = rows.prompt_tokens(raw.index)
        if text is not None:
            chat = isinstance(rows[raw.index]["prompt"], list)
            yield _encode_text(prompt_ids, next(tokenised), raw, tokenizer, chat=chat)
            continue
        try:
            prompt = rows[raw.index]["prompt"]
            arguments = rows.template_arguments(raw.index)
            turns = encode_turns(prompt_ids, prompt, raw.completion, tokenizer, arguments)
            yield Encoded(*(turns if raw.finish == Finish.STOPPED else without_end(*turns, tokenizer)), None)
        except REFUSALS as error:
            problems.add(rows.place(raw.index), f"column {raw.column!r}: {error}")


def _text_after(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], place: str
) -> str | None:
    """The text after the prompt; None for several turns."""
    if isinstance(completion, str):
        return completion
    if len(completion) > 1:
        return None
    before = render(prompt, tokenizer, arguments, generate=True)
    whole = render(prompt + completion, tokenizer, arguments)
    if not whole.startswith(before):
        raise ValueError(
            f"{place}: with the answer after it, the chat template writes the prompt in another way, so it is not "
            f"clear which words are the policy's (the prompt ends with {before[-30:]!r}); write the completion as "
            "plain text, exactly as the policy should write it after the prompt"
        )
    return whole[len(before) :]


def _encode_text(
    prompt_ids: list[int],
    continuation: Continuation,
    raw: RawCompletion,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
) -> Encoded:
    ids, stopped = continuation.ids, raw.finish == Finish.STOPPED
    if isinstance(raw.completion, list):
        ids = _up_to_end(ids, tokenizer, stopped=stopped)
    elif stopped:
        ids = ended(ids, tokenizer, chat=chat)
    starts = continuation.starts[: len(ids)]
    starts += [len(raw.completion)] * (len(ids) - len(starts))
    mask = np.arange(len(prompt_ids) + len(ids)) >= len(prompt_ids)
    return Encoded(np.array([*prompt_ids, *ids], np.int32), mask, np.array(starts))


def _up_to_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, *, stopped: bool) -> list[int]:
    """The ids of a message up to its end, without what the template writes behind it, such as a line break."""
    ids = ids[: stop_of(ids, ends_after(tokenizer, chat=True), tokenizer)]
    if stopped:
        return ended(ids, tokenizer, chat=True)
    return ids[:-1] if ids[-1:] and ids[-1] in ends_after(tokenizer, chat=True) else ids


def step_ids(encoded: Encoded, ends: Sequence[int]) -> np.ndarray:
    """Finds the step in which each token begins, -1 off the mask; a step's separator belongs to it.

    Args:
        encoded: an encoded text.
        ends: end of each step in the text, in characters, ascending; text after the last end belongs to the last step.

    Raises:
        ValueError: if no token begins in a step.
    """
    assert encoded.starts is not None
    numbers = np.minimum(np.searchsorted(np.array(ends), encoded.starts, side="right"), len(ends) - 1)
    missing = set(range(len(ends))) - set(numbers.tolist())
    if missing:
        raise ValueError(
            f"step {min(missing) + 1} of {len(ends)} has no token of its own: the tokenizer makes one token of its "
            "text and the text before it, or it is empty"
        )
    whole = np.full(len(encoded.tokens), -1, np.int32)
    whole[encoded.mask] = numbers
    return whole


def ends_of(pieces: Sequence[str]) -> list[int]:
    """End of each piece in the text that the pieces make together."""
    return np.cumsum([len(piece) for piece in pieces]).tolist()


def last_columns(step_id: np.ndarray) -> list[int]:
    """Column of the last token of each step, in order."""
    columns = (step_id >= 0).nonzero()[0].tolist()
    return [a for a, b in pairwise(columns) if step_id[a] != step_id[b]] + columns[-1:]
