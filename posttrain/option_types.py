"""Types of the options that parts take: ranges of numbers, parts inside parts, local paths.

Each is an annotation that the loader of recipes reads: a number out of range, or an unknown name, is refused with
its place in the file.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

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
