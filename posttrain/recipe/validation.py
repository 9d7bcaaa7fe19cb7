"""Checks plain data strictly against type annotations, and reports every problem with its place in the data."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ConfigDict, PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from posttrain.recipe.yaml_reader import ABSENT, Location, child, shorten, suggestion

Problems = list[tuple[Location, str]]
Hint = Callable[[str, Iterable[str]], str]
"""Function that writes a hint for an unknown name: ``(name, known names) -> text``."""

_UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden", "unexpected_positional_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


def validate(annotation: Any, value: Any, hint: Hint = suggestion) -> tuple[Any, Problems]:
    """Converts a value to the annotation's type, and lists the problems with it.

    Text is not accepted as a number, nor a truth value as an integer. A list may be a tuple and an integer a float, as
    in JSON. Infinity and NaN are no numbers unless the annotation allows them (``option_types.AnyNumber``). Annotations
    that plain data cannot be checked against are ignored.
    """
    try:
        return _adapter(annotation).validate_json(json.dumps(value), strict=True), []
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return value, []
    except ValidationError as error:
        by_location: dict[Location, list[str]] = {}
        for detail in error.errors(include_url=False):
            location = _in_data(detail["loc"], value)
            by_location.setdefault(location, []).append(_explain(annotation, location, dict(detail), hint))
        return value, [(location, " or ".join(dict.fromkeys(messages))) for location, messages in by_location.items()]


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise
        return TypeAdapter(annotation)  # a dataclass, which has a config of its own


def _in_data(path: tuple[str | int, ...], value: Any) -> Location:
    """Location of an error in the data: pydantic's path without the names of union members."""
    location: Location = ()
    for i, step in enumerate(path):
        inner = child(value, step)
        if inner is not ABSENT:
            value = inner
        if inner is not ABSENT or (
            i == len(path) - 1 and isinstance(value, dict)
        ):  # the last step: a key that is missing
            location = (*location, step)
    return location


def _explain(annotation: Any, location: Location, detail: dict[str, Any], hint: Hint) -> str:
    kind, got = detail["type"], detail["input"]
    if kind in _UNKNOWN:
        parent = dataclass_at(annotation, location[:-1])
        known = [_name(field) for field in dataclasses.fields(parent)] if parent else []
        return f"unknown key; {hint(str(location[-1]), known)}"
    if kind in _MISSING:
        return "is missing and has no default"
    if kind.startswith("dataclass"):
        return f"should be a mapping of keys to values (got {shorten(json.dumps(got))})"
    message = detail["msg"].removeprefix("Input ")
    message = f"{message} (got {shorten(json.dumps(got))})"
    if kind == "literal_error" and isinstance(got, str):
        guess = suggestion(got, detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
        message += f"; {guess}" if guess.startswith("did") else ""
    return message


def _name(field: dataclasses.Field[Any]) -> str:
    """Name of a field in YAML: its alias, if it has one."""
    return getattr(field.default, "alias", None) or field.name


def dataclass_at(annotation: Any, location: Location) -> Any:
    """The dataclass that describes the mapping at ``location``; ``None`` if there is none."""
    for step in location:
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            parent = dataclass_in(annotation)
            annotation = typing.get_type_hints(parent).get(str(step)) if parent else None
    return dataclass_in(annotation)


def dataclass_in(annotation: Any) -> Any:
    """The dataclass in ``X``, ``X | None`` or ``Annotated[X, ...]``; ``None`` if there is none."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, typing.Annotated):
        return next(filter(None, map(dataclass_in, typing.get_args(annotation))), None)
    return None
