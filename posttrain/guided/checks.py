"""What of a recipe's decoder can be wrong before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from posttrain.resolve import local_options

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
    chosen = decoder.every_option
    kinds = set(_names(decoder))
    if chosen.get("k") is not None and chosen.get("head") is not None:
        yield ("decoder", "head"), "candidates are the `k` most probable tokens or the `head` of the law, not both"
    if chosen.get("branch", 1) > 1 and getattr(chosen.get("pick"), "name", "") == "keep":
        yield ("decoder", "pick"), "keep leaves nothing out: of several branches choose with top, tilted or resample"
    for place, part in _parts(decoder, ("decoder",)):
        if part.target.__name__ == "rollout" and part.every_option["max_tokens"] > sampling.max_tokens:
            yield (*place, "max_tokens"), f"a completion ends after `sampling.max_tokens: {sampling.max_tokens}`"
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


def _names(decoder: Any) -> Iterator[str]:
    """Of the decoder, and of the one that it grows particles by."""
    while decoder is not None:
        yield decoder.target.__name__
        decoder = decoder.every_option.get("proposal")


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
