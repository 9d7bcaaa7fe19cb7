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
    """Settings that contradict each other, with their places.

    Each part of the decoder may have a function ``conflicts(options, sampling)`` that yields the problems with its own
    options.
    """
    parts = list(_parts(decoder, ("decoder",)))
    for place, part in parts:
        conflicts = getattr(part.target, "conflicts", None)
        if conflicts is not None:
            yield from ((place + key, problem) for key, problem in conflicts(part.every_option, sampling))
    reader = next((part for _, part in parts if part.fact("needs_hidden_states")), None)
    if reader is not None and engine.use == "vllm":
        yield ("engine", "use"), f"vLLM does not give the hidden states that `{reader.name}` needs: use transformers"
    shapes = any(part.fact("shapes_tokens") for _, part in parts)
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if shapes else ():
        if getattr(sampling, name) != neutral:
            yield (
                ("sampling", name),
                "cuts the distribution, and so does a decoder that shapes tokens, but engines differ in the order: "
                f"leave it at {neutral}; `decoder.k` or `decoder.head` choose the candidates",
            )


def named_models(part: Part, place: Location = ("decoder",)) -> Iterator[tuple[Location, str]]:
    """The models that a decoder and the parts in it name, each with its place in the recipe."""
    for at, inner in _parts(part, place):
        for name in local_options(inner.target):
            model = inner.every_option.get(name)
            if isinstance(model, str):
                yield (*at, name), model
            elif model is not None:
                yield from (((*at, name, index), one) for index, one in enumerate(model))


def _parts(part: Part, place: Location) -> Iterator[tuple[Location, Part]]:
    """A part and the parts in its options, each with its place in the recipe."""
    yield place, part
    for name, value in part.options.items():
        several = value if isinstance(value, tuple) else (value,)
        for index, inner in enumerate(several):
            if isinstance(inner, Part):
                yield from _parts(inner, (*place, name, index) if isinstance(value, tuple) else (*place, name))
