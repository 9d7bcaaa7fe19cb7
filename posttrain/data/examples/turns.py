"""Encodes conversations in which the assistant has several messages to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from posttrain.errors import DataError
from posttrain.models.chat_template import fitted, template_text
from posttrain.models.token_ids import ends_after, stop_of

LONGEST_BEGINNING = 16  # most tokens at the beginning of an answer that a chat template counts as the assistant's


def encode_turns(
    prompt_ids: list[int],
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a prompt and the messages after it; a message of the assistant is learned with its end.

    Returns:
        Token ids, int32 [length], and the mask of the tokens to learn, bool [length].

    Raises:
        ValueError: if it is not clear which tokens are the assistant's; the chat template raises errors of its own.
    """
    template = generation_template(tokenizer)
    whole: Any = tokenizer.apply_chat_template(
        fitted(prompt + completion, tokenizer, template),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
    )
    ids = list(whole["input_ids"])
    marked = np.array(whole["assistant_masks"], dtype=bool)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the chat template writes the prompt in another way when turns follow it")
    marked[: len(prompt_ids)] = False  # earlier turns of the assistant belong to the prompt
    if not marked.any():
        raise ValueError("the chat template's generation markers enclose none of the assistant's words")
    ends = ends_after(tokenizer, chat=True)
    turns = [_sampled(ids, turn, prompt_ids, ends, tokenizer) for turn in _runs(marked)]
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in _learned(turns, completion):
        mask[start:stop] = True
    if turns[-1][1] == len(ids) and ids[-1] not in ends:  # the template ends no turn, and sampling waits for an end
        ids, mask = [*ids, ends[0]], np.append(mask, mask[-1])
    length = int(mask.nonzero()[0][-1]) + 1
    return np.array(ids[:length], np.int32), mask[:length]


def without_end(ids: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the mask of turns whose last one was cut off, without the end that the template writes.

    Args:
        ids: int32 [length].
        mask: bool [length].
    """
    length = len(ids) - (int(ids[-1]) in ends_after(tokenizer, chat=True))
    return ids[:length], mask[:length]


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _sampled(
    ids: list[int],
    turn: tuple[int, int],
    prompt_ids: list[int],
    ends: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, int]:
    """The part of a turn that the policy would sample: from the beginning of an answer to the token that ends it.

    The prompt ends with the beginning of an answer, which templates may also count as the assistant's words, and behind
    the end they may write white space.
    """
    start, stop = turn
    for more in range(1, 1 + min(LONGEST_BEGINNING, stop - start, len(prompt_ids) - 2)):
        if ids[max(0, start - 2) : start + more] == prompt_ids[-more - 2 :]:
            start += more
            break
    if stop < len(ids) and ids[stop] in ends and not any(token in ends for token in ids[start:stop]):
        return start, stop + 1
    length = stop_of(ids[start:stop], ends, tokenizer)
    return start, start + length if length and ids[start + length - 1] in ends else stop


def _learned(turns: list[tuple[int, int]], completion: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The turns of the messages whose weight is not 0."""
    weights = [message.get("weight", 1) for message in completion if message["role"] == "assistant"]
    if all(weights):
        return turns
    if len(weights) != len(turns):
        raise ValueError(
            f"the chat template marks {len(turns)} pieces of text for {len(weights)} messages of the assistant, so it "
            "is not clear which of them has `weight: 0`"
        )
    return [turn for turn, weight in zip(turns, weights, strict=True) if weight]


def generation_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Finds a chat template with generation markers: the tokenizer's, or TRL's for the same family of models.

    Raises:
        DataError: if there is none.
    """
    template = template_text(tokenizer)
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
