"""Samples from a geometric mixture of the engine's policy and another policy, token by token.

    log π(a | s) = (1 - share) log p0(a | s) + share log p_other(a | s) - log Z(s)

The one-step-ahead mixture of Munos et al. 2023 (Nash-MD), arXiv:2312.00886; whole sequences do not follow the
normalised mixture of the sequences' distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posttrain.decoding.base import Decoder
from posttrain.decoding.candidate_cache import CandidateCache
from posttrain.decoding.model_scores import last_token, padded
from posttrain.decoding.prefixes import Prefix
from posttrain.engines.base import Completion, OnCompletion, Row, Sampling, ShapingEngine
from posttrain.models.attention import sees_all_before
from posttrain.models.policy import Policy


class Mixture(Decoder):
    """An engine that draws every token from the mixture. Log-probs of its completions are those of the mixture.

    Args:
        engine: of the policy.
        other: the other policy. Its weights may change between calls.
        share: of the other policy, in (0, 1]; 1 samples from it alone.
        without_adapters: the other policy is ``other`` without its adapters.
    """

    engine: ShapingEngine

    def __init__(self, engine: ShapingEngine, other: Policy, *, share: float, without_adapters: bool = False) -> None:
        self.engine, self.other, self.share = engine, other, share
        self._distribution = NextToken(other, without_adapters=without_adapters)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`."""
        temperature = sampling.temperature or 1.0

        def shaper(logp: Float[Tensor, "B V"], rows: Sequence[Row]) -> Float[Tensor, "B V"]:
            return mixed(logp, self._distribution([row.tokens for row in rows], temperature).to(logp), self.share)

        training = self.other.training
        self.other.eval()
        try:
            return self.engine.generate(prompts, sampling, n, seeds=seeds, on_completion=on_completion, shaper=shaper)
        finally:
            self.other.train(training)


def mixed(logp: Float[Tensor, "B V"], other: Float[Tensor, "B V"], share: float) -> Float[Tensor, "B V"]:
    """Log-probs of the normalised geometric mixture; exactly ``other`` for a share of 1."""
    return other if share == 1.0 else torch.lerp(logp, other, share).log_softmax(-1)


class NextToken:
    """Log-probs of the next token under a policy, for sequences that grow by a token a call.

    Keys and values are remembered from call to call, where all layers of the model attend to all that came before.
    """

    def __init__(self, policy: Policy, *, without_adapters: bool) -> None:
        self.policy, self.without_adapters = policy, without_adapters
        cached = sees_all_before(policy.base.config)
        self._reader = CandidateCache(_Backbone(policy, without_adapters)) if cached else None

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Sequence[int]], temperature: float) -> Float[Tensor, "B V"]:
        """Normalised next-token log-probs at the temperature, on the policy's device."""
        if self._reader is not None and min(map(len, sequences)) > 1:
            last = torch.tensor([[tokens[-1]] for tokens in sequences])
            hidden = self._reader.read([tuple(tokens[:-1]) for tokens in sequences], last)[:, 0]
        else:
            prefixes = [Prefix(tokens=list(tokens), start=0) for tokens in sequences]
            tokens, lengths = padded(prefixes, next(self.policy.parameters()).device)
            hidden = self.policy.hidden_states(tokens, reference=self.without_adapters)[last_token(tokens, lengths)]
        logits = self.policy.next_logits(hidden, temperature, reference=self.without_adapters)
        return logits.log_softmax(-1)


class _Backbone:
    """The layers of a policy in the form in which :class:`CandidateCache` takes a model."""

    adapter = None  # the choice of adapters is made here

    def __init__(self, policy: Policy, without_adapters: bool) -> None:
        self.policy, self.without_adapters = policy, without_adapters

    @property
    def config(self) -> Any:
        return self.policy.base.config

    @property
    def decoder(self) -> _Backbone:
        return self

    def parameters(self) -> Any:
        return self.policy.parameters()

    def __call__(self, **inputs: Any) -> Any:
        decoder: nn.Module = self.policy.base.get_decoder()
        with self.policy.switched(reference=self.without_adapters):
            return decoder(**inputs)
