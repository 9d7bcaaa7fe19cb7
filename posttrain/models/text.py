"""Token ids as text: for verifiers and rollouts as the model wrote it, for people without special tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from posttrain.models.chat_template import template_text, turn_ends

Decode = Callable[[Sequence[int]], str]
"""Function from token ids to text."""


def text_of(tokenizer: Any, *, special: bool = False) -> Decode:
    """Makes a function from token ids to text.

    An id that the tokenizer does not know reads as ``<|id 151700|>``. Many models have more rows in their embedding
    than their tokenizer has tokens, and may sample them; tokenizers leave such ids out without a word.

    Args:
        special: keep special tokens in the text.
    """

    def decode(ids: Sequence[int]) -> str:
        known = _known_ids(tokenizer, len(tokenizer))
        if known.issuperset(ids):
            return whole(ids)
        runs = itertools.groupby(ids, known.__contains__)
        return "".join(whole(list(run)) if has_text else "".join(map(_placeholder, run)) for has_text, run in runs)

    def whole(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    return decode


def written_text(tokenizer: Any, ends: Collection[int] = ()) -> Decode:
    """Makes a function from a completion's token ids to its text as it was written: the text that verifiers read.

    Special tokens are kept (``<think>`` is one in some vocabularies), but for the token that ends it.

    Args:
        ends: tokens that end a completion, beside those that the tokenizer and its chat template name.
    """
    decode = text_of(tokenizer, special=True)

    @functools.cache
    def all_ends() -> set[int]:
        template = () if tokenizer.chat_template is None else turn_ends(tokenizer, template_text(tokenizer))
        return {tokenizer.eos_token_id, *template, *ends}

    return lambda ids: decode(ids[:-1] if len(ids) and ids[-1] in all_ends() else ids)


def reads_as(tokenizer: Any, ids: Sequence[int], text: str) -> bool:
    """True if a tokenizer reads ids as a completion's text, which lacks the token that ended it if there was one.

    Which tokens end a completion is the matter of the run that wrote it.
    """
    decode = text_of(tokenizer, special=True)
    return text in (decode(ids), decode(ids[:-1]))


@functools.lru_cache(maxsize=8)
def _known_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """The ids that have a text; ``size`` is that of the tokenizer, which grows if tokens are added to it."""
    return frozenset(tokenizer.get_vocab().values())


def _placeholder(token: int) -> str:
    return f"<|id {token}|>"
