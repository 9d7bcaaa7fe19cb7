"""Ranges of numbers that parts take as options: a recipe with another number is refused with its place."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
AtLeastOne = Annotated[float, Field(ge=1)]
AboveOne = Annotated[float, Field(gt=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
