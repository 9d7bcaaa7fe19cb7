"""What decoders and scores of a recipe are made with, and the kinds of parts that they take as options."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.engines import make_engine
from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.option_types import Inner, LocalPath
from posttrain.recipe.sections import EngineSection

ModelPath = Annotated[str, LocalPath()]
"""Hub name or local folder."""

Score = Annotated[Callable[..., Any], Inner("posttrain.decoding.scores", ("context",))]
"""``(DecoderContext) -> PrefixScore``: what says how good a prefix is."""

OptionalScore = Annotated[Callable[..., Any] | None, Inner("posttrain.decoding.scores", ("context",))]

TextReward = Annotated[Callable[..., Any], Inner("reward_models", ("batch",))]
"""A reward part that reads texts: an object with ``of_texts(prompts, completions) -> [M]``."""

Verifier = Annotated[Callable[..., Any], Inner("posttrain.verify.functions", ("completion",))]
"""``(completion) -> float``; columns of a data set are options here."""

OptionalDecoder = Annotated[Callable[..., Any] | None, Inner("posttrain.decoding.decoders", ("engine", "context"))]
"""``(Engine, DecoderContext) -> Engine``."""

TargetDecoder = Annotated[Callable[..., Any], Inner("posttrain.decoding.decoders", ("engine", "context"))]
"""One that must be there."""

Pick = Annotated[Callable[..., Any], Inner("posttrain.decoding.particles", ("families", "choose"))]
"""``(families, choose) -> particles``: who survives a round."""

Final = Annotated[Callable[..., Any], Inner("posttrain.decoding.finals", ("particles", "choose", "decode"))]
"""``(particles, choose, decode) -> int``: which particle is the answer; ``decode`` turns token ids into text."""

Answer = Annotated[Callable[..., Any], Inner("posttrain.decoding.finals", ("text",))]
"""``(text) -> Hashable``: the answer in a completion; None where there is none."""

Propose = Annotated[Callable[..., Any], Inner("posttrain.decoding.tree", ("engine", "prefixes", "sampling", "seeds"))]
"""The steps from each of several prefixes."""

Select = Annotated[Callable[..., Any], Inner("posttrain.decoding.nodes", ("tree",))]
"""``(Tree) -> nodes``: what comes next."""

Choice = Annotated[Callable[..., Any], Inner("posttrain.decoding.nodes", ("tree",))]
"""``(Tree) -> Node``: the answer, or the next move."""

OptionalChoice = Annotated[Callable[..., Any] | None, Inner("posttrain.decoding.nodes", ("tree",))]

Backup = Annotated[Callable[..., Any], Inner("posttrain.decoding.nodes", ("leaf",))]
"""``(Node) -> None``: what a simulation changes on its path."""


@dataclass(frozen=True, kw_only=True)
class DecoderContext:
    """What a decoder of a recipe may use beside the engine."""

    tokenizer: PreTrainedTokenizerBase  # of the policy
    device: torch.device  # where models that score live
    dtype: torch.dtype = torch.float32  # their weights'
    models: dict[tuple[str, str], nn.Module] = field(default_factory=dict)  # loaded ones, by kind and path
    engine: Engine | None = None  # the one that is guided
    within_step: bool = False  # scores are asked for while that engine draws a token
    engines: dict[str, Engine] = field(default_factory=dict)  # of other models, by path

    def on(self, engine: Engine, *, within_step: bool = False) -> DecoderContext:
        """The same for a decoder on this engine; models are shared."""
        return replace(self, engine=engine, within_step=within_step)

    def engine_of(self, model: str, use: Literal["auto", "vllm", "transformers"]) -> Engine:
        """An engine that samples from another model of the same vocabulary; it goes when the guided one does."""
        if model not in self.engines:
            room: Any = self.engine
            dtype = str(self.dtype).removeprefix("torch.")
            made = make_engine(model, EngineSection(use=use), dtype=dtype, max_model_len=room.max_model_len)
            weakref.finalize(room, made.close)
            self.engines[model] = made
        return self.engines[model]

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids to text, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def loaded(self, kind: str, path: str, load: Callable[[], nn.Module]) -> nn.Module:
        """A frozen model on this device; several scores of one model share it."""
        if (kind, path) not in self.models:
            self.models[kind, path] = load().requires_grad_(False).eval().to(self.device)
        return self.models[kind, path]

    def ends(self, separator: str | None) -> tuple[int, ...]:
        """The tokens whose text ends with the separator; none for no separator.

        Raises:
            RecipeError: where no token does.
        """
        if separator is None:
            return ()
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        found = tuple(token for token, text in enumerate(texts) if text.endswith(separator))
        if not found:
            raise RecipeError(f"decoder.separator: no token of this tokenizer ends with {separator!r}")
        return found
