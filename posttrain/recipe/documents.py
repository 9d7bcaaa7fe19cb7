"""Documents of recipes: a YAML file over its base, under the overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.recipe.part import SLOTS
from posttrain.recipe.yaml_reader import Document, Location, Overrides, merge, override, read


def read_document(path: Path, overrides: Overrides) -> Document:
    """Reads a YAML file, puts it over its base, and applies the overrides."""
    document = _with_lists(read_with_base(path))
    for over in overrides:
        if isinstance(over, Document):
            document = _with_lists(merge(document, _with_lists(over), _replaces))
    return _with_lists(override(document, [argument for argument in overrides if isinstance(argument, str)]))


def read_with_base(path: Path) -> Document:
    """Reads a YAML file and puts it over its ``base:``, which may not have a base of its own.

    A mapping that names its own ``use`` replaces the base's part, so that the options of two parts are never mixed.
    """
    top = read(path)
    name = top.data.pop("base", None)
    if name is None:
        return top
    if not isinstance(name, str):
        raise RecipeError(top.problem(("base",), "should be the path of a recipe, relative to this one"))
    try:
        base = read(path.parent / name)
    except RecipeError as error:
        raise RecipeError(top.problem(("base",), "cannot be read"), *error.problems) from None
    if "base" in base.data:
        raise RecipeError(base.problem(("base",), f"{path.name} is based on this file: a base may not have a base"))
    return merge(base, top, _replaces)


def _replaces(location: Location, mapping: Mapping[str, Any]) -> bool:
    return location[:1] in _SLOT_PLACES and "use" in mapping


_SLOT_PLACES = {(slot,) for slot in SLOTS}


def _with_lists(document: Document) -> Document:
    """Puts a part that is alone in a slot of several into a list."""
    lone = {name for name, slot in SLOTS.items() if slot.several and isinstance(document.data.get(name), dict)}
    data = {name: [value] if name in lone else value for name, value in document.data.items()}
    places = {(at[0], 0, *at[1:]) if at and at[0] in lone else at: place for at, place in document.places.items()}
    return Document(data, places | {(name,): document.place((name,)) for name in lone})
