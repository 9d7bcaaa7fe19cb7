"""Checks of a recipe's decoder before anything is loaded: contradicting settings, and the models that it names."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.recipe.part import Part
from posttrain.recipe.resolve import local_options
from posttrain.recipe.sections import EngineSection, SamplingSection
from posttrain.recipe.yaml_reader import Location


def decoder_conflicts(
    decoder: Part, sampling: SamplingSection, engine: EngineSection
) -> Iterator[tuple[Location, str]]:
    """Yields settings that contradict each other, with their places in the recipe.

    Each part of the decoder may carry a function ``conflicts(options, sampling)`` that yields the problems of its own
    options, and facts (:class:`posttrain.option_types.Facts`). Users' parts may do the same.
    """
    parts = list(_parts(decoder, ("decoder",)))
    for place, part in parts:
        conflicts = getattr(part.target, "conflicts", None)
        if conflicts is not None:
            yield from ((place + option, problem) for option, problem in conflicts(part.every_option, sampling))
    hidden_reader = next((part for _, part in parts if part.fact("needs_hidden_states")), None)
    if hidden_reader is not None and engine.use == "vllm":
        message = f"vLLM does not give the hidden states that `{hidden_reader.name}` needs: use transformers"
        yield ("engine", "use"), message
    shapes_tokens = any(part.fact("shapes_tokens") for _, part in parts)
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if shapes_tokens else ():
        if getattr(sampling, name) != neutral:
            yield (
                ("sampling", name),
                "cuts the distribution, and so does a decoder that shapes tokens, but engines differ in which comes "
                f"first: leave it at {neutral}, and choose the candidates by `decoder.k` or `decoder.head`",
            )


def named_models(part: Part, place: Location = ("decoder",)) -> Iterator[tuple[Location, str]]:
    """Yields the models that a decoder and the parts in it name, each with its place in the recipe."""
    for at, inner in _parts(part, place):
        for name in local_options(inner.target):
            model = inner.every_option.get(name)
            if isinstance(model, str):
                yield (*at, name), model
            elif model is not None:
                yield from (((*at, name, index), path) for index, path in enumerate(model))


def _parts(part: Part, place: Location) -> Iterator[tuple[Location, Part]]:
    """Yields a part and the parts in its options, each with its place in the recipe."""
    yield place, part
    for name, value in part.options.items():
        several = value if isinstance(value, tuple) else (value,)
        for index, inner in enumerate(several):
            if isinstance(inner, Part):
                yield from _parts(inner, (*place, name, index) if isinstance(value, tuple) else (*place, name))
