"""Ends of a turn: the tokens at which sampling stops, and that training teaches.

Four places may name them: the chat template, the tokenizer, the model's configuration and its generation configuration.
Sampling stops at every token that one of them names, so it always stops at the one that is taught: after a rendered
prompt the template's, after plain text the tokenizer's. ``policy.end`` replaces what they say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from posttrain.models.chat_template import template_text, turn_ends
from posttrain.models.ends import chosen_ends, shown_tokens
from posttrain.models.text import Decode, written_text
from posttrain.recipe.sections import PolicySection


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
    named = ", ".join(f"{shown_tokens(tokenizer, tokens)} ({place})" for place, tokens in places.items())
    silent = "" if "model" in places else "; the model's configuration names none"
    return f"sampling stops at every end of a turn that is named: {named}{silent}. `policy.end` chooses others"


def say_ends(policy: PolicySection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints :func:`ends_message`, if there is one, to standard error: once in a run of several processes."""
    message = ends_message(policy, tokenizer)
    if message is not None and os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


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


def completion_text(policy: PolicySection, tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Makes the function from a completion's token ids to the text that verifiers read and rollouts hold."""
    return written_text(tokenizer, stop_tokens(policy, tokenizer))
