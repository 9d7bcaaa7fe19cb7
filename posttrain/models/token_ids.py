"""Texts as token ids: prompts, the texts that continue them, and the token that ends a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from posttrain.models.chat_template import template_text, turn_ends

BEFORE = ("\n", "a", ".")
"""Texts before which a continuation may be tokenised, if the tokenizer changes the beginning of every text."""


class PromptIds(NamedTuple):
    """Token ids of a plain prompt."""

    ids: list[int]
    begun: bool  # True: the text has the tokens itself that the tokenizer puts before every text


def prompt_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[PromptIds]:
    """Tokenises plain prompts: each begins once with the tokens that the tokenizer puts before texts, such as one BOS.

    Tokens that the tokenizer puts behind texts, such as one that ends a sequence, are left out: the completion follows.
    """
    before = tokens_before(tokenizer)
    prompts = []
    for ids in _ids(texts, tokenizer):
        begun = bool(before) and ids[: len(before)] == before
        prompts.append(PromptIds(ids if begun else [*before, *ids], begun))
    return prompts


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before every text."""
    whole: Any = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = _ids(["a"], tokenizer)[0]
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    return encoded["input_ids"]


class Continuation(NamedTuple):
    """Token ids of a text that continues a prompt."""

    ids: list[int]
    starts: list[int]  # first character of each token in the text


def continuations(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Continuation]:
    """Tokenises texts that continue prompts: the ids read as the text, wherever they stand.

    Tokenizers of SentencePiece's kind put a space before every text. There each text is tokenised behind a short one,
    whose tokens are then taken away.

    Raises:
        ValueError: if a text cannot be separated from the one before it, or if the tokenizer does not give the
            characters of its tokens.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer does not give the characters of each token; use its fast version")
    if _reads_on(tokenizer, ""):
        return _behind("", texts, tokenizer)
    usable = [before for before in BEFORE if _reads_on(tokenizer, before)] or [""]
    whole = _behind(usable[0], texts, tokenizer)
    return [
        continuation if continuation is not None else _separated(text, usable[1:], tokenizer)
        for text, continuation in zip(texts, whole, strict=True)
    ]


def _separated(text: str, usable: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Continuation:
    for before in usable:
        if (continuation := _behind(before, [text], tokenizer)[0]) is not None:
            return continuation
    raise ValueError(f"the tokenizer merges the beginning of {text[:30]!r} with whatever stands before it")


def _behind(before: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The texts as they are tokenised behind another one; None for a text whose tokens reach into it."""
    encoded: Any = tokenizer([before + text for text in texts], add_special_tokens=False, return_offsets_mapping=True)
    first = _ids([before], tokenizer)[0] if before else []
    found = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts = [start - len(before) for start, _ in offsets[len(first) :]]
        whole = ids[: len(first)] == first and all(start >= 0 for start in starts)
        found.append(Continuation(ids[len(first) :], starts) if whole else None)
    return found


def _reads_on(tokenizer: PreTrainedTokenizerBase, before: str) -> bool:
    """True if a text that is tokenised behind ``before`` reads as itself behind other tokens."""
    continued = _behind(before, ["b"], tokenizer)[0]
    if continued is None:
        return False
    ids = [*_ids(["a"], tokenizer)[0], *continued.ids]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "ab"


def ends_after(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[int, ...]:
    """The tokens that end a completion; the first is the one that is taught after a text.

    Args:
        chat: whether the prompt is rendered by the chat template, which then says how a turn ends.
    """
    ends = turn_ends(tokenizer, template_text(tokenizer)) if chat else ()
    return tuple(dict.fromkeys([*ends, int(tokenizer.eos_token_id)]))  # type: ignore[arg-type]


def stop_of(ids: Sequence[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of the ids up to the first end of those at their end; without one, up to the white space behind them.

    Chat templates write line breaks, and sometimes further ends, behind the end of a turn.
    """
    stop = len(ids)
    while stop and (ids[stop - 1] in ends or not str(tokenizer.decode(list(ids[stop - 1 : stop]))).strip()):
        stop -= 1
    return next((i + 1 for i in range(stop, len(ids)) if ids[i] in ends), stop)


def ended(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[int]:
    """The ids of a completion with an end: the one that they have, or else that which is taught after a text."""
    ends = ends_after(tokenizer, chat=chat)
    return list(ids) if ids and ids[-1] in ends else [*ids, ends[0]]
