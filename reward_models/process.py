"""Process reward models: a number for each reasoning step, where the step ends."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Batch
from posttrain.data.steps import cut, steps_by_text
from posttrain.errors import UserError
from posttrain.models.text import written_text
from posttrain.option_types import Positive
from posttrain.parts.credit import step_ends, weigh_worst
from reward_models.loading import (
    Dtype,
    Input,
    check_model,
    check_vocabulary,
    prompts_of,
    reads_tokens,
    render,
    tokenizer_of,
    value_model,
    values_at,
)


class ProcessModel:
    """Scores of a process reward model for each step, as ``step_reward`` at the step's last token.

    r_t = V(prompt, steps up to k) at the end of step k, 0 elsewhere;  signed: 2 V - 1;  shared: divided by the steps
    temperature T: softmax_k(-r_k / T) r_k over the completion's steps, so that the worst one dominates

    Lightman et al. 2023, arXiv:2305.20050. Signed, p(right) - p(wrong), and temperature: Cheng et al. 2025 (PURE),
    arXiv:2504.15275.
    Shared, so that more steps bring no more reward: Dai et al. 2024 (PSGPO), arXiv:2410.17621.

    Args:
        model: folder or hub name of a ``...ForTokenClassification`` with labels wrong and right, or with one label, or
            of a value model of this package.
        separator: text at which a step ends. Default: the steps that the rollout made.
        input: input of the model: ``tokens``, ``text`` or ``auto``. A model that reads text gets the steps with
            ``marker`` after each.
        marker: text after a step at which the model was trained to judge it; the value is read at the marker's last
            token. Default: no marker, and the value is read at the step's last token.
        tokenizer: folder or hub name of the policy's tokenizer, which ``separator`` needs if the model reads text.
        signed: maps values that are probabilities to rewards between -1 and 1.
        shared: divides the rewards by the number of steps.
        temperature: T; near 0 the worst step alone has a reward. Default: every step has its own.
        dtype: dtype of the weights.
        micro_batch_tokens: padded tokens in one forward pass.
    """

    def __init__(
        self,
        *,
        model: str,
        separator: str | None = None,
        input: Input = "auto",
        marker: str = "",
        tokenizer: str | None = None,
        signed: bool = False,
        shared: bool = False,
        temperature: Positive | None = None,
        dtype: Dtype = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        self.model, self.separator, self.marker = model, separator, marker
        self.input: Input = input
        self.tokenizer, self.signed, self.shared, self.temperature = tokenizer, signed, shared, temperature
        self.dtype, self.micro_batch_tokens = dtype, micro_batch_tokens

    def needs(self) -> set[str]:
        """Fields of the batch that the model reads. Fails if the model does not exist."""
        check_model(self.model)
        if not reads_tokens(self.model, self.input) and (self.separator is None or self.tokenizer is None):
            raise UserError(
                "reward_models.process: a model that reads text needs `separator` (the text at which a step ends) and "
                "`tokenizer` (the policy's), to find the tokens of the steps"
            )
        return {"tokens", "mask", "step_id", "rows", "texts"}

    def __call__(self, batch: Batch) -> Float[Tensor, "N L"]:
        """The step rewards, 0 off the ends of steps."""
        by_tokens = reads_tokens(self.model, self.input)
        if self.separator is not None:
            batch = batch.set(step_id=self._steps(batch, self.model if by_tokens else str(self.tokenizer)))
        ends = step_ends(batch)
        values = self._by_tokens(batch, ends) if by_tokens else self._by_text(batch, ends)
        values = 2 * values - 1 if self.signed else values
        values = values / ends.sum(-1, keepdim=True).clamp(min=1) if self.shared else values
        return values.where(ends, 0.0) if self.temperature is None else weigh_worst(values, ends, self.temperature)

    def _steps(self, batch: Batch, tokenizer: str) -> Int[Tensor, "N L"]:
        """The number of each token's step, with steps that end at the separator."""
        return steps_by_text(batch, written_text(tokenizer_of(tokenizer)), self.separator or "")

    def _by_tokens(self, batch: Batch, ends: Tensor) -> Float[Tensor, "N L"]:
        """The values of a model that reads the policy's tokens, at the ends of steps."""
        check_vocabulary(self.model, batch)
        columns = [row.nonzero().squeeze(-1).tolist() for row in ends]
        tokens = [ids[: at[-1] + 1].tolist() for ids, at in zip(batch.tokens, columns, strict=True)]
        return self._values(tokens, columns, ends)

    def _by_text(self, batch: Batch, ends: Tensor) -> Float[Tensor, "N L"]:
        """The values of a model that reads text, at the ends of the policy's steps."""
        tokenizer = tokenizer_of(self.model)
        tokens, columns = [], []
        for row, (prompt, text) in enumerate(zip(prompts_of(batch), batch.texts, strict=True)):
            steps = cut(text, self.separator or "", int(ends[row].sum()))
            ids, at = step_columns(prompt, steps, self.separator or "", self.marker, tokenizer)
            tokens.append(ids)
            columns.append(at)
        return self._values(tokens, columns, ends)

    def _values(self, tokens: list[list[int]], columns: list[list[int]], ends: Tensor) -> Float[Tensor, "N L"]:
        """The values at ``columns`` of the model's tokens, written to the ends of the policy's steps."""
        model, values = value_model(self.model, self.dtype), torch.zeros(ends.shape)
        values[ends] = torch.cat(values_at(model, tokens, columns, self.micro_batch_tokens))
        return values


def step_columns(
    prompt: Any, steps: list[str], separator: str, marker: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Encodes prompt and steps for a model that reads text; returns the tokens and the column of each step's value.

    Args:
        steps: the steps, without the separators between them.
        separator: text between two steps. It is put back only if ``marker`` is empty.
        marker: text that is put after each step, in place of the separator.

    Raises:
        UserError: if the chat template changes the completion.
    """
    pieces = [step + (marker or separator * (i < len(steps) - 1)) for i, step in enumerate(steps)]
    text = "".join(pieces)
    rendered = render(prompt, text, tokenizer)
    start = rendered.rfind(text)
    if start < 0:
        raise UserError("reward_models.process: the model's chat template changes the text of the completion")
    encoded: Any = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    columns, end = [], start
    for piece in pieces:
        end += len(piece)
        columns.append(
            max(i for i, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > first)
        )
    return encoded["input_ids"], columns
