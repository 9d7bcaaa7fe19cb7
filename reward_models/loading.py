"""The models behind scorers: loaded once a process, and run in micro-batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Batch, pad
from posttrain.errors import UserError
from posttrain.micro_batches import length_groups
from posttrain.models.load import DTYPES, configuration_of, pretrained_tokenizer
from posttrain.models.text import reads_as, text_of
from posttrain.models.value import ValueModel
from posttrain.models.value_files import load_value
from posttrain.system.long_work import LongWork

Input = Literal["auto", "tokens", "text"]
"""Input of a model. ``tokens``: the policy's own token ids. ``text``: prompt and completion, encoded by the model's
tokenizer and chat template. ``auto``: tokens if this package trained the model, else text."""

Dtype = Literal["float32", "bfloat16"]
"""Dtype of a model's weights."""


@functools.cache
def value_model(model: str, dtype: str) -> ValueModel:
    """Loads a frozen value, reward or process model onto this process's device."""
    return load_value(model, dtype=DTYPES[dtype]).requires_grad_(False).to(device())


@functools.cache
def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that was saved with a model.

    Raises:
        RecipeError: if there is none.
    """
    return pretrained_tokenizer("reward.model", model)


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def check_model(model: str) -> Any:
    """Loads the configuration of a model, to check that the model exists.

    Raises:
        RecipeError: if there is no such model.
    """
    return configuration_of("reward.model", model)


def reads_tokens(model: str, input: Input) -> bool:
    """True if the model reads the policy's own token ids."""
    return input == "tokens" or input == "auto" and getattr(check_model(model), "posttrain", None) is not None


def check_vocabulary(model: str, batch: Batch) -> None:
    """Checks on the longest completion that token ids mean the same to the model and to the policy.

    Without this check wrong scores would go unnoticed.

    Raises:
        UserError: if the model's tokenizer decodes the completion differently.
    """
    row = int(batch.tokens_chosen.argmax())
    ids, tokenizer = batch.tokens[row][batch.mask[row]].tolist(), tokenizer_of(model)
    if not reads_as(tokenizer, ids, batch.texts[row]):
        text = text_of(tokenizer, special=True)(ids)
        raise UserError(
            f"reward model {model!r}: its tokenizer decodes the policy's tokens as {text[:60]!r}, but the completion "
            f"is {batch.texts[row][:60]!r}: it has another tokenizer. Set `input: text`"
        )


@torch.inference_mode()
def values_at(
    model: ValueModel, tokens: Sequence[Sequence[int]], columns: Sequence[Sequence[int]], micro_batch_tokens: int
) -> list[Float[Tensor, " C"]]:
    """Values of the prefixes of each sequence that end at ``columns``, on the CPU.

    Raises:
        UserError: if a sequence has more tokens than the model has positions.
    """
    lengths = torch.tensor([len(ids) for ids in tokens])
    limit = getattr(model.decoder.config, "max_position_embeddings", None)
    if limit is not None and int(lengths.max()) > limit:
        raise UserError(
            f"reward model: prompt and completion have {int(lengths.max())} tokens, but the model has only {limit} "
            "positions"
        )
    values: list[Tensor] = [torch.empty(0)] * len(tokens)
    model_device = next(model.parameters()).device
    work = LongWork("reward model, texts", len(tokens))
    for rows in length_groups(lengths, micro_batch_tokens):
        ids = pad([tokens[row] for row in rows], dtype=torch.long)
        states = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            states[i, list(columns[row])] = True
        value = model(ids.to(model_device), states.to(model_device))[0].float().cpu()
        for i, row in enumerate(rows):
            values[row] = value[i, list(columns[row])]
        work.count(len(rows))
        work.batch_ended()
    return values


def render(prompt: Any, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Formats prompt and completion as the text that a model with its own chat template reads.

    Args:
        prompt: messages, to which the chat template is applied, or plain text, which the completion continues.

    Raises:
        UserError: if the prompt is messages and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt + completion + str(tokenizer.eos_token or "")
    if tokenizer.chat_template is None:
        raise UserError("reward model: the prompts are messages, but the model's tokenizer has no chat template")
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def prompts_of(batch: Batch) -> list[Any]:
    """The prompt of each completion, as text or messages."""
    return [row["prompt"] for row in batch.rows]
