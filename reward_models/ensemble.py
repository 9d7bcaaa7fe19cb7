"""Ensembles of outcome reward models, which are harder to exploit than one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch
from reward_models.loading import Dtype, Input
from reward_models.outcome import OutcomeModel

Reduction = Literal["mean", "min", "mean_minus_std", "mean_minus_variance"]


def reduce(rewards: Float[Tensor, "E N"], how: Reduction, coefficient: float = 1.0) -> Float[Tensor, " N"]:
    """Reduces the rewards of E models to one.

    mean;  min (worst case);  mean - c · standard deviation;  mean - c · variance (uncertainty-weighted)

    Coste et al. 2023, arXiv:2310.02743: min, and the variance with c = 0.5 for best-of-n and 0.1 for PPO.
    Deviation and variance are over all E models (divided by E).
    """
    mean = rewards.mean(0)
    if how == "mean":
        return mean
    if how == "min":
        return rewards.amin(0)
    spread = rewards.std(0, correction=0) if how == "mean_minus_std" else rewards.var(0, correction=0)
    return mean - coefficient * spread


class EnsembleModel:
    """Several outcome reward models as one; see :func:`reduce`.

    Args:
        models: folders or hub names. Several heads on one backbone are a value model with ``members``, not an ensemble.
        reduce: how the models' rewards become one.
        coefficient: the coefficient c.
        shifts: shift of each model, because rewards must be on one scale to be compared. Default: 0.
        scales: scale of each model. Default: 1.
        input: see :class:`reward_models.outcome.OutcomeModel`.
        dtype: dtype of the weights.
        micro_batch_tokens: padded tokens in one forward pass.

    Raises:
        ValueError: if there are fewer than two models, or not as many shifts or scales as models.
    """

    def __init__(
        self,
        *,
        models: list[str],
        reduce: Reduction = "mean",
        coefficient: float = 1.0,
        shifts: list[float] | None = None,
        scales: list[float] | None = None,
        input: Input = "auto",
        dtype: Dtype = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        count = len(models)
        if count < 2:
            raise ValueError(f"ensemble: needs at least two models, not {count}; one is `use: reward_models.outcome`")
        for name, values in (("shifts", shifts), ("scales", scales)):
            if values is not None and len(values) != count:
                raise ValueError(f"ensemble: {count} models but {len(values)} {name}")
        self.coefficient = coefficient
        self.reduce: Reduction = reduce
        self.members = [
            OutcomeModel(
                model=model,
                input=input,
                shift=shift,
                scale=scale,
                dtype=dtype,
                micro_batch_tokens=micro_batch_tokens,
            )
            for model, shift, scale in zip(models, shifts or [0.0] * count, scales or [1.0] * count, strict=True)
        ]

    def needs(self) -> set[str]:
        """Fields of the batch that the models read. Fails if one of the models does not exist."""
        return set().union(*(member.needs() for member in self.members))

    def __call__(self, batch: Batch) -> Float[Tensor, " N"]:
        """The reward of each completion."""
        return self._reduced([member(batch) for member in self.members])

    def of_texts(self, prompts: Sequence[Any], completions: Sequence[str]) -> Float[Tensor, " M"]:
        """The rewards of completions in text form."""
        return self._reduced([member.of_texts(prompts, completions) for member in self.members])

    def of_prefixes(self, prefixes: Sequence[Any]) -> Float[Tensor, " M"]:
        """The rewards of prefixes, from the policy's own tokens."""
        return self._reduced([member.of_prefixes(prefixes) for member in self.members])

    def _reduced(self, rewards: Sequence[Float[Tensor, " N"]]) -> Float[Tensor, " N"]:
        return reduce(torch.stack(list(rewards)), self.reduce, self.coefficient)
