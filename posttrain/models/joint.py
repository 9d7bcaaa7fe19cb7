"""The models that a run trains, joined in one module, because Accelerate and DeepSpeed wrap one module."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posttrain.batch import Batch, Outputs
from posttrain.models.policy import Policy
from posttrain.models.value import ValueModel


class Passes(NamedTuple):
    """Results of one pass of each trained model; None where a model is not trained or a result was not asked for."""

    logp: Float[Tensor, "N L"] | None
    entropy: Float[Tensor, "N L"] | None
    kl_ref: Float[Tensor, "N L"] | None
    collision: Float[Tensor, "N L"] | None
    value: Float[Tensor, "M N L"] | None  # values by each member
    value_logits: Float[Tensor, "M N L K"] | None


class JointModel(nn.Module):
    """The policy, the value model, or both: the models that have a loss."""

    def __init__(self, policy: Policy | None, value: ValueModel | None) -> None:
        super().__init__()
        self.policy, self.value = policy, value

    def forward(
        self,
        tokens: Int[Tensor, "N L"],
        mask: Bool[Tensor, "N L"],
        states: Bool[Tensor, "N L"],
        **asked: Any,
    ) -> Passes:
        """Runs one pass of each model.

        Args:
            asked: keyword arguments of :meth:`posttrain.models.policy.Policy.statistics`.
        """
        logp = entropies = kl_ref = collision = value = logits = None
        if self.policy is not None:
            logp, entropies, kl_ref, collision = self.policy.statistics(tokens, mask, **asked)
        if self.value is not None:
            value, logits = self.value(tokens, states, members=True)
        return Passes(logp, entropies, kl_ref, collision, value, logits)


def forward(
    trained: nn.Module,
    batch: Batch,
    *,
    temperature: float,
    entropy: bool = False,
    collision: bool = False,
    kl_from: Policy | None = None,
    support: Tensor | None = None,
) -> list[Outputs]:
    """Runs one pass of a (wrapped) :class:`JointModel` over a batch.

    Returns:
        Outputs for each member of the value model, or one if no value model is trained. If the policy is not trained,
        their log-probs are those from before the update, or 0 if no part reads them.
    """
    asked = {"temperature": temperature, "entropy": entropy, "collision": collision, "kl_from": kl_from}
    passes = Passes(*trained(batch.tokens, batch.mask, batch.states, **asked))
    before = batch.logp_old if batch.logp_old is not None else torch.zeros_like(batch.logp_sampler)
    outputs = Outputs(
        logp=before if passes.logp is None else passes.logp,
        entropy=passes.entropy,
        kl_ref=passes.kl_ref,
        collision=passes.collision,
        support=support,
    )
    if passes.value is None:
        return [outputs]
    logits = [None] * len(passes.value) if passes.value_logits is None else list(passes.value_logits)
    members = zip(passes.value, logits, strict=True)
    return [dataclasses.replace(outputs, value=value, value_logits=of_member) for value, of_member in members]
