"""Types of the options that parts take: ranges of numbers, parts inside parts, local paths.

Each is an annotation that the loader of recipes reads: a number out of range, or an unknown name, is refused with
its place in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field


class Inner(NamedTuple):
    """Marks, in an option's annotation, that its value is a part: ``{use: name, <options>}`` in a recipe."""

    module: str  # where bare names are looked up
    takes: tuple[str, ...]  # what the outer part passes by position
    several: bool = False  # filled in where the option is a tuple of such parts


class LocalPath(NamedTuple):
    """Marks, in an option's annotation, a path that is looked for beside the recipe and then in the working folder."""


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
AtLeastOne = Annotated[float, Field(ge=1)]
AboveOne = Annotated[float, Field(gt=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]

Made = TypeVar("Made", bound=Callable[..., Any])
Option = Mapping[str, Any]
"""The options of a part, defaults included, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a part that code outside the part must know, so that it need not know any part by name.

    A fact that depends on the part's options is a function of them: ``compares_group=lambda options: options["n"] > 1``.
    """

    compares_group: bool | Callable[[Option], bool] = False
    """Compares the completions of a prompt with each other; one completion a prompt leaves it nothing to do."""
    others_write: bool = False
    """A rollout in which some of a prompt's completions are not the policy's own."""
    plays_opponent: bool = False
    """A rollout that samples from the recipe's ``opponent``."""
    learns_without_advantage: bool = False
    """A loss of preferences, which needs no ``advantage``."""
    ranks_completions: bool = False
    """A loss of preferences with options ``score`` and ``beta``, by which metrics rank the completions."""
    needs_mismatched: bool = False
    """Reads completions that were written for other prompts, which ``examples: {mismatched: true}`` adds."""
    gives_mismatched: bool | Callable[[Option], bool] = False
    """Examples with completions that were written for other prompts."""
    soft_value: str | None = None
    """What the value learns is soft: the name of the option that holds its temperature."""
    exact_logp: bool = False
    """A decoder whose log-probs are those of the distribution that its tokens are drawn from."""
    needs_hidden_states: bool = False
    """A decoder that reads the policy's hidden states, which vLLM does not give."""
    shapes_tokens: bool = False
    """A decoder that changes each token's distribution, and must be alone in cutting it."""


def facts(**known: Any) -> Callable[[Made], Made]:
    """Decorator that gives a part its :class:`Facts`: ``@facts(compares_group=True)``. A user's own part may have it."""

    def mark(part: Made) -> Made:
        part.facts = Facts(**known)  # type: ignore[attr-defined]
        return part

    return mark


def fact(part: Any, name: str, options: Option) -> Any:
    """What a part says of itself under a name of :class:`Facts`; the default for a part that says nothing.

    Args:
        part: the function or class.
        options: its options, defaults included.
    """
    value = getattr(getattr(part, "facts", Facts()), name)
    return value(options) if callable(value) else value
