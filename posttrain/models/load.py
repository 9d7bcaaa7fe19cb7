"""Models and tokenizers, loaded from the hub or from a folder, with messages for what cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RecipeError
from posttrain.recipe.sections import PolicySection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


UNLOADABLE = (OSError, ImportError, ValueError, RuntimeError, SafetensorError)
"""What Transformers raises where a model is absent, of an unknown kind, damaged, or of other shapes than it says."""


def load_tokenizer(options: PolicySection) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    Raises:
        RecipeError: where the model cannot be found, or has no end-of-sequence token to stop at.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except UNLOADABLE as error:
        raise RecipeError(not_found("policy.model", options.model, error)) from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"policy.model: the tokenizer of {options.model} has no end-of-sequence token to stop at")
    return tokenizer


def text_of(tokenizer: Any, *, special: bool = False) -> Callable[[Sequence[int]], str]:
    """A function from token ids to text.

    Args:
        special: keep special tokens in the text.
    """
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def not_found(place: str, model: str, error: Exception) -> str:
    """What to tell a person whose model could not be loaded; ``place``: where in the recipe it is named."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().exists():
        return f"{place}: there is no folder {model!r}"
    return f"{place}: cannot load {model!r}: {first}"


def context_length(options: PolicySection) -> int | None:
    """Longest prompt + completion that the model's positions allow; None where its configuration does not say."""
    config = AutoConfig.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    options: PolicySection, *, dtype: torch.dtype, model: str | None = None, place: str = "policy.model"
) -> PreTrainedModel:
    """A causal language model in the Hugging Face format, on the CPU, without dropout being touched.

    Args:
        options: the policy section of a recipe.
        dtype: of the weights in memory.
        model: another model of the same settings, such as the reference.
        place: where in the recipe the model is named.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model or options.model,
            dtype=dtype,
            attn_implementation=options.attention,
            revision=options.revision if model is None else None,
            trust_remote_code=options.trust_remote_code,
        )
    except UNLOADABLE as error:
        raise RecipeError(not_found(place, model or options.model, error)) from error
