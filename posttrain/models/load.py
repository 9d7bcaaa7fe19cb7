"""Loads models and tokenizers from the hub or from a folder. Messages say why one cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RecipeError, UserError
from posttrain.models.attention import kernel_for
from posttrain.models.chat_template import syntax_error
from posttrain.models.dropout import keep_rates, switch_off
from posttrain.models.ends import set_ends
from posttrain.models.load_checks import (
    check_weights,
    no_model,
    refuse_adapter_folder,
    refuse_other_tokens,
    refuse_tokens_without_weights,
)
from posttrain.models.logit_map import logit_map
from posttrain.recipe.sections import PolicySection
from posttrain.system.hub import offline_note, use_hub
from posttrain.system.places import is_there

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def loading(place: str, model: str) -> Iterator[None]:
    """Turns whatever is raised inside the block, while a model or tokenizer is loaded, into a :class:`RecipeError`.

    Transformers raises errors of many classes if a model is absent, unknown or damaged. What can be seen of a folder
    is looked at before, and the hub is not waited for if it cannot be reached.

    Args:
        place: key of the recipe that names the model, with which the message begins.
    """
    if problem := no_model(model):
        raise RecipeError(f"{place}: {problem}")
    if not is_there(Path(model)):
        use_hub()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise RecipeError(not_found(place, model, error)) from error


def configuration_of(place: str, model: str, **origin: Any) -> Any:
    """Loads the configuration of a model, to check that the model exists.

    Args:
        place: key of the recipe that names the model.
        origin: ``revision`` and ``trust_remote_code``, as for ``from_pretrained``.

    Raises:
        RecipeError: if it cannot be read.
    """
    with loading(place, model):
        return AutoConfig.from_pretrained(model, **origin)


def pretrained_tokenizer(place: str, model: str, **origin: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, with its chat template.

    Args:
        place: key of the recipe that names the model.
        origin: ``revision`` and ``trust_remote_code``, as for ``from_pretrained``.

    Raises:
        RecipeError: if there is none, if it makes no tokens of a text, or if its template has a syntax error.
    """
    with loading(place, model):
        tokenizer = AutoTokenizer.from_pretrained(model, **origin)
        has_tokens = bool(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not has_tokens:
        raise RecipeError(f"{place}: {model!r} has no tokenizer, or one that makes no tokens of a text")
    if problem := syntax_error(tokenizer):
        raise RecipeError(f"{place}: the chat template of {model!r} is damaged: {problem}")
    return tokenizer


def load_tokenizer(options: PolicySection) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, whose end-of-sequence token is the first of ``policy.end`` if the recipe sets it.

    Raises:
        RecipeError: if the model cannot be found, if its tokenizer has no end-of-sequence token to stop at, or if
            ``policy.end`` contradicts the tokenizer or its chat template.
    """
    origin = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    with loading("policy.model", options.model):
        refuse_adapter_folder(options, "policy.model")
        config = AutoConfig.from_pretrained(options.model, **origin)
    tokenizer = pretrained_tokenizer("policy.model", options.model, **origin)
    refuse_tokens_without_weights(tokenizer, config.get_text_config().vocab_size, options.model)
    if options.end is not None:
        set_ends(tokenizer, options.end)
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"policy.model: the tokenizer of {options.model} has no end-of-sequence token to stop at; name one in "
            "`policy.end`"
        )
    return tokenizer


def embedding_rows(options: PolicySection) -> int:
    """Number of rows of the policy's embedding: every token id must be smaller."""
    config = AutoConfig.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return int(config.get_text_config().vocab_size)


def check_tokens(policy: PolicySection, model: str, place: str, *, kind: str) -> None:
    """Checks that token ids mean the same to another model and to the policy, by their tokenizers.

    Args:
        place: key of the recipe that names the other model.
        kind: kind of the other model, such as ``reference``, for the message.

    Raises:
        RecipeError: if the other model has no tokenizer, or another one than the policy.
    """
    trust = policy.trust_remote_code
    theirs = pretrained_tokenizer(place, model, trust_remote_code=trust).get_vocab()
    ours = AutoTokenizer.from_pretrained(policy.model, revision=policy.revision, trust_remote_code=trust).get_vocab()
    refuse_other_tokens(ours, theirs, f"{place}: {model!r}", kind=kind)


def not_found(place: str, model: str, error: Exception) -> str:
    """The message for a model that could not be loaded.

    Args:
        place: key of the recipe that names the model.
    """
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    reason = " ".join(lines[: 1 if isinstance(error, OSError) else 2]) or type(error).__name__
    if is_there(Path(model)):
        return f"{place}: cannot load {model!r}: {reason}"
    return f"{place}: there is no folder {model!r}, and the hub does not give such a model: {reason}{offline_note()}"


def context_length(options: PolicySection) -> int | None:
    """Longest prompt + completion that the model's positions allow; None if its configuration does not say."""
    config = AutoConfig.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    options: PolicySection,
    *,
    dtype: torch.dtype,
    model: str | None = None,
    place: str = "policy.model",
    headless: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model in the Hugging Face format, on the CPU.

    Args:
        options: the policy section of a recipe.
        dtype: dtype of the weights in memory.
        model: another model with the same settings, such as the reference.
        place: key of the recipe that names the model.
        headless: its output layer is not used, and may be missing.

    Raises:
        RecipeError: if it cannot be loaded, if weights are missing, or if log-probs of its family are not known.
    """
    source = options if model is None else replace(options, model=model, revision=None)
    loaded = pretrained(AutoModelForCausalLM, source, dtype, place, headless=headless)
    try:
        logit_map(loaded)
    except UserError as error:
        raise RecipeError(f"{place}: {error}") from error
    return loaded


def check_checkpoint(source: PolicySection, place: str = "policy.model") -> None:
    """Checks that a language model has all of its weights, without reading them. vLLM alone would not.

    vLLM joins queries, keys and values in one matrix, and the gate with the up projection. It counts such a matrix as
    read when one part of it was.

    Args:
        place: key of the recipe that names the model.

    Raises:
        RecipeError: if weights are missing, have no place in the model, or have another shape.
    """
    pretrained(AutoModelForCausalLM, source, torch.float32, place, device="meta")


def pretrained(
    auto_class: Any,
    source: PolicySection,
    dtype: torch.dtype,
    place: str,
    *,
    headless: bool = False,
    device: str | None = None,
) -> Any:
    """Loads a model of one of Transformers' auto classes, with an attention kernel that has all of its features.

    Its dropout is switched off unless ``source.dropout``.

    Args:
        place: key of the recipe that names the model.
        headless: its output layer is not used, and may be missing.
        device: device to load to; on ``meta`` weights are compared by name and shape, and not read. Default: the CPU.

    Raises:
        RecipeError: if there is no such model, if it is damaged, or if its weights are not those of the class.
    """
    origin = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    with loading(place, source.model):
        refuse_adapter_folder(source, place)
        config = AutoConfig.from_pretrained(source.model, **origin)
        kernel = kernel_for(config, source.attention)
        rates = {} if source.dropout else switch_off(config)
        model, report = auto_class.from_pretrained(
            source.model,
            config=config,
            dtype=dtype,
            attn_implementation=kernel,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
            output_loading_info=True,
            device_map=device,
            **origin,
        )
    check_weights(model, report, f"{place}: {source.model!r}", headless=headless)
    keep_rates(model, rates)
    return model
