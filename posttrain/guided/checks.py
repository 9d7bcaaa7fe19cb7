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
    for name in local_options(part.target):
        if (model := part.every_option.get(name)) is not None:
            if isinstance(model, str):
                yield (*place, name), model
            else:
                yield from (((*place, name, index), each) for index, each in enumerate(model))
    for name, value in part.options.items():
        several = value if isinstance(value, tuple) else (value,)
        for index, inner in enumerate(several):
            if hasattr(inner, "every_option"):
                at = (*place, name, index) if isinstance(value, tuple) else (*place, name)
                yield from named_models(inner, at)
