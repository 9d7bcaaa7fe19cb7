"""Ends of a turn: the tokens at which sampling stops, and that training teaches.

Four places may name them: the chat template, the tokenizer, the model's configuration and its generation configuration.
Sampling stops at every token that one of them names, so it always stops at the one that is taught: after a rendered
prompt the template's, after plain text the tokenizer's. ``policy.end`` replaces what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RecipeError
from posttrain.models.chat_template import template_text, turn_ends
from posttrain.recipe.sections import PolicySection


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
            f"policy.end: the chat template ends a turn with {_shown(tokenizer, written)}, which is not among "
            f"{_shown(tokenizer, tokens)}: it would be taught, and sampling would go on behind it. Add it, or "
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


def stop_tokens(policy: PolicySection, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens at which sampling from a policy stops."""
    if policy.end is not None:
        return chosen_ends(tokenizer, policy.end)
    return tuple(dict.fromkeys(token for tokens in named_ends(policy, tokenizer).values() for token in tokens))


def named_ends(policy: PolicySection, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, tuple[int, ...]]:
    """The tokens that each place names as the end of a turn; a place that names none is left out."""
    model = end_of_sequence_ids(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
    template = () if tokenizer.chat_template is None else turn_ends(tokenizer, template_text(tokenizer))
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)  # type: ignore[arg-type]
    places = {"model": model, "tokenizer": own, "chat template": template}
    return {place: tokens for place, tokens in places.items() if tokens}


def ends_message(policy: PolicySection, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Says which ends are named where, if sampling from the model alone would not stop at all of them."""
    if policy.end is not None:
        return None
    places = named_ends(policy, tokenizer)
    if set(places.get("model", ())) >= {token for tokens in places.values() for token in tokens}:
        return None
    named = ", ".join(f"{_shown(tokenizer, tokens)} ({place})" for place, tokens in places.items())
    silent = "" if "model" in places else "; the model's configuration names none"
    return f"sampling stops at every end of a turn that is named: {named}{silent}. `policy.end` chooses others"


def name_ends(model: PreTrainedModel, ends: Sequence[int]) -> None:
    """Writes the ends into the generation configuration of a model, which is saved with it."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    named = model.generation_config.eos_token_id
    if {named} if isinstance(named, int) else set(named or ()) != set(ends):
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def end_of_sequence_ids(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """The model's own end-of-sequence tokens, from its generation configuration or else from its configuration."""
    try:
        ids = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # the model has no generation_config.json
        ids = None
    if ids is None:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        ids = config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _shown(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    texts: Any = tokenizer.convert_ids_to_tokens(list(tokens))
    return " and ".join(map(str, texts))
