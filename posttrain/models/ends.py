"""Ends of a turn that a recipe chooses, and those that a saved model names. :mod:`posttrain.engines.ends` says more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RecipeError
from posttrain.models.chat_template import template_text, turn_ends


def set_ends(tokenizer: PreTrainedTokenizerBase, end: str | int | Sequence[str | int]) -> None:
    """Makes the first token of ``policy.end`` the tokenizer's end of sequence.

    Raises:
        RecipeError: if one of them is no token, or if the chat template ends turns with a token that is not among them.
    """
    tokens = chosen_ends(tokenizer, end)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[0])
    if tokenizer.chat_template is None:
        return
    written = turn_ends(tokenizer, template_text(tokenizer))[:1]
    if written and written[0] not in tokens:
        raise RecipeError(
            f"policy.end: the chat template ends a turn with {shown_tokens(tokenizer, written)}, which is not among "
            f"{shown_tokens(tokenizer, tokens)}: it would be taught, and sampling would go on behind it. Add it, or "
            "change the template"
        )


def chosen_ends(tokenizer: PreTrainedTokenizerBase, end: str | int | Sequence[str | int]) -> tuple[int, ...]:
    """The tokens of ``policy.end`` as ids.

    Raises:
        RecipeError: if there are none, or if one of them is no token.
    """
    tokens = []
    for token in [end] if isinstance(end, str | int) else end:
        number = tokenizer.get_vocab().get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < len(tokenizer):
            raise RecipeError(f"policy.end: {token!r} is no token of the tokenizer, which has {len(tokenizer)}")
        tokens.append(number)
    if not tokens:
        raise RecipeError("policy.end: is empty; name the token that ends a completion")
    return tuple(dict.fromkeys(tokens))


def name_ends(model: PreTrainedModel, ends: Sequence[int]) -> None:
    """Writes the ends into the generation configuration of a model, which is saved with it."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    named = model.generation_config.eos_token_id
    if set([named] if isinstance(named, int) else named or ()) != set(ends):
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def shown_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The texts of tokens, for a message."""
    texts: Any = tokenizer.convert_ids_to_tokens(list(tokens))
    return " and ".join(map(str, texts))
