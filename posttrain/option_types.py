"""Types of the options that parts take: ranges of numbers, parts inside parts, local paths.

Each is an annotation that the loader of recipes reads. It refuses a number out of range, or an unknown name, with the
place in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, Field


class Inner(NamedTuple):
    """Marks an option whose value is a part, written ``{use: name, <options>}`` in a recipe."""

    module: str  # module in which bare names are looked up
    takes: tuple[str, ...]  # parameters that the outer part passes by position
    several: bool = False  # True if the option is a tuple of such parts; the loader sets it


class LocalPath(NamedTuple):
    """Marks an option that is a path, which is looked for beside the recipe and then in the working folder."""


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
AtLeastOne = Annotated[float, Field(ge=1)]
AboveOne = Annotated[float, Field(gt=1)]
LARGEST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
TEMPERATURES = (0.01, 2.0)
"""Lowest and highest temperature above 0. vLLM takes no higher one, and samples at 0.01 where a lower one is asked for;
in float32, logits divided by a much smaller number are infinite."""


def no_tiny_temperature(temperature: float) -> float:
    """Returns a temperature; raises ``ValueError`` if it is above 0 and below the lowest that engines take."""
    if 0 < temperature < TEMPERATURES[0]:
        raise ValueError(f"should be 0, for the most probable tokens, or at least {TEMPERATURES[0]}")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=TEMPERATURES[1]), AfterValidator(no_tiny_temperature)]
Breadth = Annotated[int, Field(ge=1, le=2**16)]
"""Number of things that are in memory side by side: completions of a prompt, members of an ensemble, particles."""
RowCount = Annotated[int, Field(ge=1, le=2**20)]
"""Number of prompts or examples that are in memory together."""

PlaceName = Annotated[str, Field(min_length=1)]
"""Path of a file or folder, or name on the hub: the empty text would be the working folder."""


def with_home(path: str) -> str:
    """Replaces ``~`` in a path by the home folder; raises ``ValueError`` if there is no such user."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"there is no user {Path(path).parts[0][1:]!r} with a home folder") from None


OutputPath = Annotated[PlaceName, AfterValidator(with_home)]
"""Path of a file or folder to write; ``~`` is the home folder."""

Share = Annotated[float, Field(ge=-1e6, le=1e6)]
"""Weight or coefficient of a term in a sum. Beyond these bounds float32 sums lose all other terms."""

Made = TypeVar("Made", bound=Callable[..., Any])
Option = Mapping[str, Any]
"""The options of a part, defaults included, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a part that other code reads, so that it does not have to know any part by name.

    A fact may be a function of the part's options: ``compares_group=lambda options: options["n"] > 1``.
    """

    compares_group: bool | Callable[[Option], bool] = False
    """The part compares the completions of a prompt with each other: with one per prompt it has nothing to do."""
    others_write: bool = False
    """The rollout contains completions that are not the policy's own."""
    plays_opponent: bool = False
    """The rollout samples from the recipe's ``opponent``."""
    learns_without_advantage: bool = False
    """The loss learns from preferences and needs no ``advantage``."""
    keeps_scores: bool = False
    """The combination leaves the verifiers' weighted sum as it is where there is no other reward."""
    ranks_completions: bool = False
    """The loss has the options ``score`` and ``beta``, by which metrics rank the completions."""
    compares_values: bool = False
    """The value loss compares values with each other, so that they need not explain any target."""
    needs_mismatched: bool = False
    """The part reads completions that were written for other prompts; ``examples: {mismatched: true}`` adds them."""
    gives_mismatched: bool | Callable[[Option], bool] = False
    """The examples contain completions that were written for other prompts."""
    soft_value: str | None = None
    """Name of the option that holds the temperature, for a part from which the value learns a soft value."""
    exact_logp: bool = False
    """The decoder's log-probs are those of the distribution that its tokens are drawn from."""
    needs_hidden_states: bool = False
    """The decoder reads the policy's hidden states, which vLLM does not give."""
    shapes_tokens: bool = False
    """The decoder changes each token's distribution, so no other option may cut that distribution."""


def facts(**known: Any) -> Callable[[Made], Made]:
    """Decorator that gives a part its :class:`Facts`: ``@facts(compares_group=True)``. Users' parts may have it too."""

    def mark(part: Made) -> Made:
        part.facts = Facts(**known)  # type: ignore[attr-defined]
        return part

    return mark


def fact(part: Any, name: str, options: Option) -> Any:
    """Value of one of a part's :class:`Facts`; the default if the part has none.

    Args:
        part: function or class of the part.
        name: field of :class:`Facts`.
        options: options of the part, defaults included.
    """
    value = getattr(getattr(part, "facts", Facts()), name)
    return value(options) if callable(value) else value
