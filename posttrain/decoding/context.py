"""The context in which a recipe's decoders and scores are made, and the marks of options that need it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.engines import make_engine, uses_vllm
from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.models.load import check_checkpoint, pretrained_tokenizer
from posttrain.models.load_checks import refuse_other_tokens
from posttrain.models.text import Decode, written_text
from posttrain.option_types import Inner, LocalPath
from posttrain.recipe.sections import EngineSection, PolicySection

ModelPath = Annotated[str, LocalPath()]
"""Hub name or local folder of a model."""

TextReward = Annotated[Callable[..., Any], Inner("reward_models", ("batch",))]
"""A reward part as an option that reads texts: an object with ``of_texts(prompts, completions) -> [M]``."""

VerifierOption = Annotated[Callable[..., Any], Inner("posttrain.verify.functions", ("completion",))]
"""A verifier ``(completion) -> float`` as an option. Dataset columns that it reads are options here."""


class PythonOnly(NamedTuple):
    """Marks a parameter that only callers in Python can set, not recipes."""


class FromContext(NamedTuple):
    """Marks a parameter that recipes cannot set, because it is filled with an attribute of the context."""

    attribute: str


class SeparatorMark(NamedTuple):
    """Marks token ids that a recipe writes as a text, such as a line break: all tokens that end with it."""


Value = TypeVar("Value")
NotInRecipes = Annotated[Value, PythonOnly()]
"""A parameter that only callers in Python can set."""
Separator = Annotated[tuple[int, ...], SeparatorMark()]
"""Token ids that end a block or step; in a recipe the text that they end with."""


@dataclass(frozen=True, kw_only=True)
class DecoderContext:
    """Everything that a decoder of a recipe may use besides the engine."""

    tokenizer: PreTrainedTokenizerBase  # tokenizer of the policy
    device: torch.device  # device of the models that score
    dtype: torch.dtype = torch.float32  # data type of the weights of these models
    models: dict[tuple[str, str], nn.Module] = field(default_factory=dict)  # loaded models, by kind and path
    engine: Engine | None = None  # the engine that is guided
    within_step: bool = False  # True if scores are asked for while the guided engine draws a token
    engines: dict[str, Engine] = field(default_factory=dict)  # engines of further models, by path

    def on(self, engine: Engine, *, within_step: bool = False) -> DecoderContext:
        """The context of a decoder on this engine. Loaded models are shared with the other contexts."""
        return replace(self, engine=engine, within_step=within_step)

    def engine_of(self, model: str, use: Literal["auto", "vllm", "transformers"]) -> Engine:
        """An engine that samples from another model of the same vocabulary. It is closed with the guided engine."""
        if model not in self.engines:
            self.check_tokens(model)
            guided: Any = self.engine
            dtype = str(self.dtype).removeprefix("torch.")
            options = EngineSection(use=use)
            if uses_vllm(options):
                check_checkpoint(PolicySection(model=model), place="decoder")
            engine = make_engine(model, options, dtype=dtype, max_model_len=guided.max_model_len)
            weakref.finalize(guided, engine.close)
            self.engines[model] = engine
        return self.engines[model]

    @property
    def decode(self) -> Decode:
        """The function from token ids to text as it was written."""
        return written_text(self.tokenizer)

    def check_tokens(self, model: str) -> None:
        """Checks that token ids mean the same to a model that the decoder names and to the policy.

        Raises:
            RecipeError: if the model has no tokenizer, or another one.
        """
        theirs = pretrained_tokenizer("decoder", model).get_vocab()
        refuse_other_tokens(self.tokenizer.get_vocab(), theirs, f"decoder: {model!r}", kind="model")

    def loaded(self, kind: str, path: str, load: Callable[[], nn.Module]) -> nn.Module:
        """A frozen model on the context's device. Scores that name the same model share it.

        Args:
            load: loads the model when it is asked for the first time.
        """
        if (kind, path) not in self.models:
            self.check_tokens(path)
            self.models[kind, path] = load().requires_grad_(False).eval().to(self.device)
        return self.models[kind, path]

    def ends(self, separator: str | None) -> tuple[int, ...]:
        """The tokens whose text ends with the separator; an empty tuple without a separator.

        Raises:
            RecipeError: if no token ends with it.
        """
        if separator is None:
            return ()
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        tokens = tuple(token for token, text in enumerate(texts) if text.endswith(separator))
        if not tokens:
            raise RecipeError(f"decoder.separator: no token of this tokenizer ends with {separator!r}")
        return tokens
