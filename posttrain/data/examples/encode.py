"""Encodes dataset completions as the token ids that the policy would have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from posttrain.batch import Finish
from posttrain.data.problems import Problems, shown
from posttrain.data.prompts import message_problem
from posttrain.data.rows import Rows
from posttrain.errors import DataError

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
    return None


def encode(
    rows: Rows, raw: Sequence[RawCompletion], tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> list[Encoded]:
    """Encodes prompts with their completions as token ids.

    A text counts as the policy's own words: the prompt's ids, the text's ids, and the end-of-sequence token if it
    ended. One assistant's message is encoded as the chat template writes it after the prompt. Among several messages
    the assistant's are the policy's words. The template's generation markers say which tokens these are; if it has
    none, those of TRL's template for the same family of models.

    Args:
        rows: rows with tokenised prompts.
        raw: the completions.
        template: further arguments of the chat template.

    Raises:
        DataError: if a row cannot be encoded; the message names each such row.
    """
    problems, encoded = Problems(), []
    for start in range(0, len(raw), CHUNK):
        encoded += _encode_chunk(rows, raw[start : start + CHUNK], tokenizer, template, problems)
    problems.raise_if_any()
    return encoded


def _encode_chunk(
    rows: Rows,
    chunk: Sequence[RawCompletion],
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any],
    problems: Problems,
) -> Iterator[Encoded]:
    texts: list[str | None] = []
    for raw in chunk:
        place = f"column {raw.column!r}"
        prompt = rows[raw.index]["prompt"]
        try:
            if problem := completion_problem(raw.completion, prompt):
                raise ValueError(f"{place} {problem}")
            texts.append(_text_after(prompt, raw.completion, tokenizer, template, place))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            problems.add(rows.place(raw.index), str(error))
            texts.append("")
    plain = [text for text in texts if text is not None]
    tokenised = iter(_tokenise(plain, tokenizer))
    for raw, text in zip(chunk, texts, strict=True):
        prompt_ids = rows.prompt_tokens(raw.index)
        if text is not None:
            yield _encode_text(prompt_ids, *next(tokenised), raw, tokenizer)
            continue
        try:
            yield _encode_turns(prompt_ids, rows[raw.index]["prompt"] + raw.completion, tokenizer, template)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            problems.add(rows.place(raw.index), f"column {raw.column!r}: {error}")


def _tokenise(texts: list[Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenises each text: its ids, and the range of characters of each id."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise DataError("examples: the tokenizer does not give the characters of each token; use its fast version")
    encoding: Any = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))


def _text_after(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], place: str
) -> str | None:
    """The text after the prompt; None for several turns."""
    if isinstance(completion, str):
        return completion
    if len(completion) > 1:
        return None
    before = _render(prompt, tokenizer, template, add_generation_prompt=True)
    whole = _render(prompt + completion, tokenizer, template)
    if not whole.startswith(before):
        raise ValueError(
            f"{place}: with the answer after it, the chat template writes the prompt in another way, so it is not "
            f"clear which words are the policy's (the prompt ends with {before[-30:]!r}); write the completion as "
            "plain text, exactly as the policy should write it after the prompt"
        )
    return whole[len(before) :]


def _render(messages: Any, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], **arguments: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **template))


def _encode_text(
    prompt_ids: list[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    raw: RawCompletion,
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    end: Any = tokenizer.eos_token_id
    stopped = raw.finish == Finish.STOPPED
    if isinstance(raw.completion, list) and end in ids:  # templates put a line break after the end
        ids = ids[: len(ids) - ids[::-1].index(end) - (not stopped)]
    elif isinstance(raw.completion, str) and stopped and ids[-1:] != [end]:
        ids = [*ids, end]
    starts = [first for first, _ in offsets[: len(ids)]]
    starts += [len(raw.completion)] * (len(ids) - len(starts))
    mask = np.arange(len(prompt_ids) + len(ids)) >= len(prompt_ids)
    return Encoded(np.array([*prompt_ids, *ids], np.int32), mask, np.array(starts))


def _encode_turns(
    prompt_ids: list[int], messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Mapping
) -> Encoded:
    whole: Any = tokenizer.apply_chat_template(
        messages,
        chat_template=generation_template(tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template,
    )
    ids = list(whole["input_ids"])
    mask = np.array(whole["assistant_masks"], dtype=bool)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the chat template writes the prompt in another way when turns follow it")
    mask[: len(prompt_ids)] = False  # earlier turns of the assistant belong to the prompt
    if not mask.any():
        raise ValueError("the chat template's generation markers enclose none of the assistant's words")
    length = int(mask.nonzero()[0][-1]) + 1
    return Encoded(np.array(ids[:length], np.int32), mask[:length], None)


def generation_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Finds a chat template with generation markers: the tokenizer's, or TRL's for the same family of models.

    Raises:
        DataError: if there is none.
    """
    template: Any = tokenizer.chat_template
    template = template["default"] if isinstance(template, dict) else template
    if has_generation_markers(template):
        return template
    try:
        with_markers = get_training_chat_template(tokenizer)
    except ValueError:
        with_markers = None
    if with_markers is None:
        raise DataError(
            "examples of several turns: the tokenizer's chat template has no {% generation %} markers, which say which "
            "tokens the policy wrote; put them around the assistant's content in the template, or cut the examples "
            "into prompts with one answer each"
        )
    return with_markers


def turn_ids(mask: np.ndarray) -> np.ndarray:
    """Numbers the runs of chosen tokens: for each token the number of its run, -1 off the mask.

    Args:
        mask: bool [length].
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    return np.where(mask, begins.cumsum() - 1, -1).astype(np.int32)


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
