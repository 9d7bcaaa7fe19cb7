"""Process reward models: a number for each reasoning step, where the step ends."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Batch
from posttrain.data.steps import cut, steps_by_text
from posttrain.errors import UserError
from posttrain.parts.credit import step_ends
from reward_models.loading import (
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
    """What a process reward model says of each step, as ``step_reward`` at the step's last token.

    r_t = V(prompt, steps up to k) at the end of step k, 0 elsewhere;  signed: 2 V - 1;  shared: divided by the steps

    Lightman et al. 2024, arXiv:2305.20050. Signed, p(right) - p(wrong): Cheng et al. 2025 (PURE), arXiv:2504.15275.
    Shared, so that more steps bring no more reward: Dai et al. 2024 (PSGPO), section 3.3, arXiv:2410.17621.

    Args:
        model: folder or hub name of a ``...ForTokenClassification`` with labels wrong and right, or with one label, or
            of a value model of this package.
        separator: what a step ends with. Default: the steps that the rollout made.
        input: what it reads. A model that reads text gets the steps with ``marker`` behind each.
        marker: what the model was trained to judge a step at; its value is read at the marker's last token. Default:
            nothing, and the value is read at the step's last token.
        tokenizer: the policy's tokenizer, folder or hub name; a model that reads text needs it for ``separator``.
        signed: rewards between -1 and 1, of a model whose values are probabilities.
        shared: divides by the number of steps.
        dtype: of the weights.
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
        dtype: Literal["float32", "bfloat16"] = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        self.model, self.separator, self.marker = model, separator, marker
        self.input: Input = input
        self.tokenizer, self.signed, self.shared = tokenizer, signed, shared
        self.dtype, self.micro_batch_tokens = dtype, micro_batch_tokens

    def needs(self) -> set[str]:
        """Fields of the batch that it reads; fails where there is no such model."""
        check_model(self.model)
        if not reads_tokens(self.model, self.input) and (self.separator is None or self.tokenizer is None):
            raise UserError(
                "reward_models.process: a model that reads text needs `separator` (what a step ends with) and "
                "`tokenizer` (the policy's), to know which tokens its steps are"
            )
        return {"tokens", "mask", "step_id", "rows", "texts"}

    def __call__(self, batch: Batch) -> Float[Tensor, "N L"]:
        """The step rewards, 0 off the ends of steps."""
        tokens = reads_tokens(self.model, self.input)
        if self.separator is not None:
            batch = batch.set(step_id=self._steps(batch, self.model if tokens else str(self.tokenizer)))
        ends = step_ends(batch)
        values = self._by_tokens(batch, ends) if tokens else self._by_text(batch, ends)
        values = 2 * values - 1 if self.signed else values
        values = values / ends.sum(-1, keepdim=True).clamp(min=1) if self.shared else values
        return values.where(ends, 0.0)

    def _steps(self, batch: Batch, tokenizer: str) -> Int[Tensor, "N L"]:
        its = tokenizer_of(tokenizer)
        return steps_by_text(
            batch, lambda ids: str(its.decode(list(ids), skip_special_tokens=True)), self.separator or ""
        )

    def _by_tokens(self, batch: Batch, ends: Tensor) -> Float[Tensor, "N L"]:
        check_vocabulary(self.model, batch)
        columns = [row.nonzero().squeeze(-1).tolist() for row in ends]
        tokens = [ids[: at[-1] + 1].tolist() for ids, at in zip(batch.tokens, columns, strict=True)]
        return self._placed(tokens, columns, ends)

    def _by_text(self, batch: Batch, ends: Tensor) -> Float[Tensor, "N L"]:
        tokenizer = tokenizer_of(self.model)
        tokens, columns = [], []
        for row, (prompt, text) in enumerate(zip(prompts_of(batch), batch.texts, strict=True)):
            steps = cut(text, self.separator or "", int(ends[row].sum()))
            ids, at = step_columns(prompt, steps, self.separator or "", self.marker, tokenizer)
            tokens.append(ids)
            columns.append(at)
        return self._placed(tokens, columns, ends)

    def _placed(self, tokens: list[list[int]], columns: list[list[int]], ends: Tensor) -> Float[Tensor, "N L"]:
        """The values at ``columns`` of the model's tokens, at the ends of the policy's steps."""
        model, values = value_model(self.model, self.dtype), torch.zeros(ends.shape)
        values[ends] = torch.cat(values_at(model, tokens, columns, self.micro_batch_tokens))
        return values


def step_columns(
    prompt: Any, steps: list[str], separator: str, marker: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Prompt and steps as a text model's tokens, and the columns at which it judges each step.

    Args:
        steps: without the separator behind each but the last.
        marker: stands behind each step in place of the separator, or before it where the marker is empty.

    Raises:
        UserError: where the chat template changes the completion.
    """
    pieces = [step + (marker or separator * (i < len(steps) - 1)) for i, step in enumerate(steps)]
    text = "".join(pieces)
    rendered = render(prompt, text, tokenizer)
    start = rendered.rfind(text)
    if start < 0:
        raise UserError("reward_models.process: the model's chat template changes what the assistant said")
    encoded: Any = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    columns, end = [], start
    for piece in pieces:
        end += len(piece)
        columns.append(
            max(i for i, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > first)
        )
    return encoded["input_ids"], columns
