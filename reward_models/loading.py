"""Models behind scorers: loaded once a process, asked in micro-batches."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from posttrain.batch import Batch
from posttrain.errors import RecipeError, UserError
from posttrain.micro_batches import length_groups
from posttrain.models.load import DTYPES, not_found
from posttrain.models.value import ValueModel
from posttrain.models.value_files import load_value

Input = Literal["auto", "tokens", "text"]
"""What a model reads: ``tokens`` the policy's own ids, ``text`` prompt and completion by its own tokenizer and chat
template; ``auto`` tokens if this package trained it, else text."""


@functools.cache
def value_model(model: str, dtype: str) -> ValueModel:
    """A value, reward or process model on this process's device, frozen."""
    return load_value(model, dtype=DTYPES[dtype]).requires_grad_(False).to(device())


@functools.cache
def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a model.

    Raises:
        RecipeError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RecipeError(not_found("reward.model", model, error)) from error


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def check_model(model: str) -> Any:
    """The configuration of a model.

    Raises:
        RecipeError: where there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RecipeError(not_found("reward.model", model, error)) from error


def reads_tokens(model: str, input: Input) -> bool:
    """Whether the model is given the policy's own token ids."""
    return input == "tokens" or input == "auto" and getattr(check_model(model), "posttrain", None) is not None


def check_vocabulary(model: str, batch: Batch) -> None:
    """The policy's ids must mean to the model what they mean to the policy: wrong scores would look like scores.

    Raises:
        UserError: where the longest completion reads differently.
    """
    row = int(batch.tokens_chosen.argmax())
    ids = batch.tokens[row][batch.mask[row]].tolist()
    found = tokenizer_of(model).decode(ids, skip_special_tokens=True)
    if found != batch.texts[row]:
        raise UserError(
            f"reward model {model!r}: the policy's tokens read {str(found)[:60]!r} to it, and the completion is "
            f"{batch.texts[row][:60]!r}: it has another tokenizer. Set `input: text`"
        )


@torch.inference_mode()
def values_at(
    model: ValueModel, tokens: Sequence[Sequence[int]], columns: Sequence[Sequence[int]], micro_batch_tokens: int
) -> list[Float[Tensor, " C"]]:
    """The values of each sequence's prefixes that end with the given columns, on the CPU.

    Raises:
        UserError: for a sequence of more tokens than the model has positions.
    """
    lengths = torch.tensor([len(ids) for ids in tokens])
    limit = getattr(model.decoder.config, "max_position_embeddings", None)
    if limit is not None and int(lengths.max()) > limit:
        raise UserError(f"reward model: {int(lengths.max())} tokens of prompt and completion; it has {limit} positions")
    found: list[Tensor] = [torch.empty(0)] * len(tokens)
    where = next(model.parameters()).device
    for rows in length_groups(lengths, micro_batch_tokens):
        padded, states = _padded([tokens[row] for row in rows], [columns[row] for row in rows])
        value = model(padded.to(where), states.to(where))[0].float().cpu()
        for i, row in enumerate(rows):
            found[row] = value[i, list(columns[row])]
    return found


def _padded(tokens: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]) -> tuple[Tensor, Bool[Tensor, "N L"]]:
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    states = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (its, wanted) in enumerate(zip(tokens, columns, strict=True)):
        ids[row, : len(its)] = torch.tensor(its)
        states[row, list(wanted)] = True
    return ids, states


def render(prompt: Any, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and answer as text, as a model with its own chat template reads them.

    Args:
        prompt: messages, which the chat template is applied to, or plain text, which the completion continues.

    Raises:
        UserError: for messages without a chat template.
    """
    if isinstance(prompt, str):
        return prompt + completion + str(tokenizer.eos_token or "")
    if tokenizer.chat_template is None:
        raise UserError("reward model: the prompts are messages, but its tokenizer has no chat template")
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def prompts_of(batch: Batch) -> list[Any]:
    """The prompt of each completion, as text or messages."""
    return [row["prompt"] for row in batch.rows]
