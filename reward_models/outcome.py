"""Outcome reward models: one number for a prompt and a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
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


class OutcomeModel:
    """The value of the whole completion by a reward model or a saved value model.

    r = (V(prompt, completion) - shift) / scale

    Ouyang et al. 2022, arXiv:2203.02155. With the mean and standard deviation of V over samples of the initial policy
    as ``shift`` and ``scale``, rewards start with mean 0 and variance 1: Ziegler et al. 2019,
    arXiv:1909.08593; :func:`posttrain.reports.reward_curves.moments` gives both.

    Args:
        model: folder or hub name of a value model of this package, of a ``...ForSequenceClassification`` with one
            label, or of a ``...ForTokenClassification``, which is read at the last token.
        input: input of the model: ``tokens``, ``text`` or ``auto``.
        shift: value of V that gives reward 0.
        scale: V at reward 1 minus V at reward 0.
        dtype: dtype of the weights.
        micro_batch_tokens: padded tokens in one forward pass.

    Raises:
        ValueError: if the scale is not positive.
    """

    def __init__(
        self,
        *,
        model: str,
        input: Input = "auto",
        shift: float = 0.0,
        scale: float = 1.0,
        dtype: Dtype = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        if scale <= 0:
            raise ValueError(f"outcome: scale divides the rewards and must be positive, not {scale}")
        self.model, self.shift, self.scale = model, shift, scale
        self.input: Input = input
        self.dtype, self.micro_batch_tokens = dtype, micro_batch_tokens

    def needs(self) -> set[str]:
        """Fields of the batch that the model reads. Fails if the model does not exist."""
        check_model(self.model)
        return {"tokens", "mask", "rows", "texts"}

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        """The reward of each completion."""
        if not reads_tokens(self.model, self.input):
            return self.of_texts(prompts_of(batch), batch.texts)
        check_vocabulary(self.model, batch)
        last = [int(row.nonzero()[-1]) for row in batch.mask]
        return self._of_tokens([ids[: end + 1].tolist() for ids, end in zip(batch.tokens, last, strict=True)])

    def of_texts(self, prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        """The rewards of completions in text form, encoded by the model's own tokenizer and chat template.

        Args:
            prompts: messages or plain text of each completion.
        """
        tokenizer = tokenizer_of(self.model)
        texts = [render(prompt, text, tokenizer) for prompt, text in zip(prompts, completions, strict=True)]
        return self._of_tokens(tokenizer(texts, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def of_prefixes(self, prefixes: Sequence[Any]) -> Float[Tensor, " M"]:
        """The rewards of prefixes (``posttrain.decoding.prefixes.Prefix``), from the policy's own tokens."""
        return self._of_tokens([list(prefix.tokens) for prefix in prefixes])

    def _of_tokens(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, " M"]:
        model = value_model(self.model, self.dtype)
        values = values_at(model, tokens, [[len(ids) - 1] for ids in tokens], self.micro_batch_tokens)
        return (torch.cat(values) - self.shift) / self.scale
