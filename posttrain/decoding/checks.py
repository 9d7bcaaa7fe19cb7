"""What of a recipe's decoder can be wrong before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from posttrain.recipe.resolve import local_options

Location = tuple[str | int, ...]
Make = TypeVar("Make", bound=Callable[..., Any])

_MARK = "law_is_known"


def law_known(make: Make) -> Make:
    """Marks a decoder whose log-probs are those of the law that its tokens are drawn from."""
    setattr(make, _MARK, True)
    return make


def law_is_known(decoder: Any) -> bool:
    """Whether importance weights may be made of the decoder's log-probs."""
    return getattr(decoder.target, _MARK, False)


def decoder_conflicts(decoder: Any, sampling: Any, engine: Any) -> Iterator[tuple[Location, str]]:
    """Settings that are right one by one and wrong together.

    Args:
        decoder: the part.
        sampling: ``options.SamplingOptions``.
        engine: ``options.EngineOptions``.
    """
    kinds = set()
    for place, part in _parts(decoder, ("decoder",)):
        kinds.add(part.target.__name__)
        yield from ((place + key, problem) for key, problem in _part_conflicts(part, sampling))
    if "edited" in kinds and engine.use == "vllm":
        yield ("engine", "use"), "vLLM keeps hidden states to itself, which `edited` needs: transformers"
    if "shaped" in kinds:
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(sampling, name) != neutral:
                yield (
                    ("sampling", name),
                    f"cuts the law, and so does `shaped`, in an order that engines do not share: leave it at {neutral};"
                    " `decoder.k` or `decoder.head` choose the candidates",
                )


def _part_conflicts(part: Any, sampling: Any) -> Iterator[tuple[Location, str]]:
    """Of one of the parts that a decoder is made of, by its own keys."""
    chosen = part.every_option
    if chosen.get("k") is not None and chosen.get("head") is not None:
        yield ("head",), "candidates are the `k` most probable tokens or the `head` of the law, not both"
    if chosen.get("branch", 1) > 1 and _name(chosen.get("pick")) == "keep":
        yield ("pick",), "keep leaves nothing out: of several branches choose with top, tilted or resample"
    if part.target.__name__ == "rollout" and chosen["max_tokens"] > sampling.max_tokens:
        yield ("max_tokens",), f"a completion ends after `sampling.max_tokens: {sampling.max_tokens}`"
    if part.target.__name__ == "rejection":
        yield from _pinning_conflicts(chosen["population"])


def _pinning_conflicts(population: Any) -> Iterator[tuple[Location, str]]:
    """What keeps a population from holding a pinned particle."""
    if population.target.__name__ != "population":
        yield ("population", "use"), "only the particles of a `population` bound Z"
        return
    chosen = population.every_option
    if chosen["branch"] > 1:
        yield ("population", "branch"), "a pinned particle has one continuation: leave it at 1"
    if chosen["strength"] <= 0:
        yield ("population", "strength"), "must be above 0: the highest score is then the most probable to be accepted"
    if _name(chosen["pick"]) not in ("resample", "keep"):
        yield ("population", "pick"), "particles bound Z where they have weights: resample or keep"


def _name(part: Any) -> str:
    return getattr(part, "name", getattr(part, "__name__", ""))


def named_models(part: Any, place: Location = ("decoder",)) -> Iterator[tuple[Location, str]]:
    """The models that a decoder and the parts in it name, with where they do."""
    for at, each in _parts(part, place):
        for name in local_options(each.target):
            model = each.every_option.get(name)
            if isinstance(model, str):
                yield (*at, name), model
            elif model is not None:
                yield from (((*at, name, index), one) for index, one in enumerate(model))


def _parts(part: Any, place: Location) -> Iterator[tuple[Location, Any]]:
    """A part and those in its options, with where they stand."""
    yield place, part
    for name, value in part.options.items():
        several = value if isinstance(value, tuple) else (value,)
        for index, inner in enumerate(several):
            if hasattr(inner, "every_option"):
                yield from _parts(inner, (*place, name, index) if isinstance(value, tuple) else (*place, name))
