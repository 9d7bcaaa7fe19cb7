"""Implicit rewards: the log-ratio of a tuned language model to its reference shows what the tuning rewarded."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, seq_sum
from posttrain.micro_batches import length_groups
from posttrain.models.load import DTYPES, load_model
from posttrain.models.policy import Policy
from posttrain.recipe import sections
from reward_models.loading import Dtype, check_model, check_vocabulary, device


@functools.cache
def language_model(model: str, dtype: str) -> Policy:
    """Loads a frozen language model onto this process's device."""
    loaded = load_model(sections.PolicySection(model=model), dtype=DTYPES[dtype])
    return Policy(loaded).requires_grad_(False).eval().to(device())


class ImplicitModel:
    """β times the log-ratio of a tuned language model to the one it was tuned from.

    r_t = β (log π(y_t | y_<t) - log π_ref(y_t | y_<t)), [N, L];  summed over the completion, [N]

    Sum: Rafailov et al. 2023 (DPO), eq. 5, arXiv:2305.18290, up to a constant of the prompt.
    Per token, as process rewards: Yuan et al. 2024, arXiv:2412.01981; Cui et al. 2025 (PRIME),
    arXiv:2502.01456, both with β = 0.05.

    Args:
        model: folder or hub name of the tuned model; it reads the policy's own tokens.
        reference: folder or hub name of the model that it was tuned from.
        beta: the factor β.
        level: ``token`` adds to the step rewards, ``sequence`` to the reward.
        dtype: dtype of the weights.
        micro_batch_tokens: padded tokens in one forward pass.
    """

    def __init__(
        self,
        *,
        model: str,
        reference: str,
        beta: float = 0.05,
        level: Literal["token", "sequence"] = "token",
        dtype: Dtype = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        self.model, self.reference, self.beta, self.level = model, reference, beta, level
        self.dtype, self.micro_batch_tokens = dtype, micro_batch_tokens

    def needs(self) -> set[str]:
        """Fields of the batch that the models read. Fails if one of the models does not exist."""
        for model in (self.model, self.reference):
            check_model(model)
        return {"tokens", "mask", "length", "texts"}

    def __call__(self, batch: Batch) -> Tensor:
        """Rewards of tokens ``[N, L]`` or of completions ``[N]``, depending on ``level``."""
        for model in (self.model, self.reference):
            check_vocabulary(model, batch)
        rewards = self.beta * (self._logp(self.model, batch) - self._logp(self.reference, batch))
        return rewards if self.level == "token" else seq_sum(rewards, batch.mask)

    @torch.inference_mode()
    def _logp(self, name: str, batch: Batch) -> Float[Tensor, "N L"]:
        model, logp = language_model(name, self.dtype), torch.zeros(batch.mask.shape)
        for rows in length_groups(batch.length, self.micro_batch_tokens):
            part = batch[rows].trim().to(device())
            logp[rows, : part.tokens.shape[1]] = model(part.tokens, part.mask)[0].cpu()
        return logp
