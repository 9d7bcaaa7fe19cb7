"""Builds the decoder that a recipe asks for, on the engine of its run."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from posttrain.decoding.checks import named_models
from posttrain.decoding.context import DecoderContext
from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.models.load import DTYPES, configuration_of
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import dotted
from posttrain.system.processes import Processes


def build_decoder(
    decoder: Part | None,
    engine: Engine | None,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    policy: sections.PolicySection,
) -> Engine | None:
    """Builds the decoder on the engine; None without a decoder or an engine. Its scores have the policy's dtype.

    Weights may be loaded later into the engine or into the decoder; both ways reach the engine.
    """
    if decoder is None or engine is None:
        return None
    return decoder(engine, decoder_context(tokenizer, processes, policy))


def decoder_context(
    tokenizer: PreTrainedTokenizerBase, processes: Processes, policy: sections.PolicySection
) -> DecoderContext:
    """Makes the context of a run's decoders. A model that several of them name is loaded once."""
    return DecoderContext(tokenizer=tokenizer, device=processes.device, dtype=DTYPES[policy.dtype])


def check_models(decoder: Part | None) -> None:
    """Checks that each model which the decoder names has a configuration that can be read.

    Raises:
        RecipeError: if a configuration cannot be read. Nothing has been loaded then.
    """
    if decoder is None:
        return
    problems = []
    for place, model in named_models(decoder):
        try:
            configuration_of(dotted(place), model)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
