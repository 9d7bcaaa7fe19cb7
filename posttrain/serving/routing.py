"""Routes a request to the engine or to the decoder on it, at the strength that the request asks for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from posttrain.decoding.base import Decoder
from posttrain.decoding.particles import rule_of, top
from posttrain.decoding.population import Population
from posttrain.decoding.shaping import Shaped
from posttrain.engines.base import Engine, Sampling
from posttrain.engines.stepping import SteppingEngine
from posttrain.seeds import FreshSeeds
from posttrain.serving.errors import ApiError
from posttrain.serving.limits import Limit, check_texts
from posttrain.serving.protocol import Guide
from posttrain.serving.worker import Worker

MOST_STRENGTHS = 64
"""Most decoders that are kept, one for each strength that differs from the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is served under a name.

    Args:
        decoder: the decoder, or the engine if the recipe has no decoder.
        sampling: settings for requests that leave them out.
        seeds: seeds for requests without a seed.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    engine: SteppingEngine
    decoder: Engine
    sampling: Sampling
    limit: Limit
    worker: Worker
    seeds: FreshSeeds
    _by_strength: dict[float, Engine] = field(default_factory=dict)  # requests of one strength are decoded together

    def check_texts(self, text: str | Sequence[object], param: str) -> None:
        """Raises ``ApiError`` for texts that are not Unicode or too long; see ``limits.check_texts``."""
        check_texts(text, param, self.tokenizer, self.engine.max_model_len)

    def check_model(self, name: str) -> None:
        """Raises ``ApiError`` if the name is not the served model's."""
        if name != self.name:
            message = f"The model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def route(self, guide: Guide | bool, sampling: Sampling) -> tuple[Engine, float | None]:
        """The engine or decoder that samples a request, and the strength of a token-wise guide.

        Raises:
            ApiError: if the decoder has no strength to set, or if the guide cannot be combined with filters.
        """
        strength = guide.strength if isinstance(guide, Guide) else None
        if guide is False or strength == 0:
            return self.engine, None
        if strength is not None and self.decoder is self.engine:
            raise ApiError(400, "guide: this server has no guide, because its recipe has no decoder", param="guide")
        _check_filters(self.decoder, sampling)
        if strength is None:
            return self.decoder, None
        if isinstance(self.decoder, Shaped):
            return self.decoder, strength
        if strength not in self._by_strength:
            if len(self._by_strength) >= MOST_STRENGTHS:
                self._by_strength.clear()
            self._by_strength[strength] = _at_strength(self.decoder, strength)
        return self._by_strength[strength], None


def _at_strength(decoder: Engine, strength: float) -> Engine:
    if not isinstance(decoder, Population) or isinstance(decoder.engine, Shaped):
        message = f"guide.strength: this server's decoder, {type(decoder).__name__}, has no strength to set"
        raise ApiError(400, message, param="guide")
    if rule_of(decoder.pick) is top and strength > 0:
        message = "guide.strength: this server's decoder takes the best of its samples, whatever the strength"
        raise ApiError(400, message, param="guide")
    adjusted = copy.copy(decoder)
    adjusted.strength = strength
    return adjusted


def _check_filters(decoder: Engine, sampling: Sampling) -> None:
    while isinstance(decoder, Decoder):
        if isinstance(decoder, Shaped) and sampling.temperature > 0 and not sampling.is_full_softmax:
            message = (
                "top_p, top_k and min_p cut the distribution, as the guide does: leave them out, or set guide: false"
            )
            raise ApiError(400, message, param="top_p")
        decoder = decoder.engine
