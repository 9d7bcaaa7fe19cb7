"""Loads recipes: YAML becomes a recipe, or one error with every problem and its place."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import UserError
from posttrain.recipe.documents import read_document
from posttrain.recipe.hints import hint_for
from posttrain.recipe.part import SLOTS, Part, RecipeConflict
from posttrain.recipe.part_reader import PartReader
from posttrain.recipe.validation import dataclass_in, validate
from posttrain.recipe.yaml_reader import Document, Location, Overrides

T = TypeVar("T")
Result = TypeVar("Result")

PATHS: tuple[Location, ...] = (
    ("data", "path"),
    ("evaluate", "data", "path"),
    ("policy", "model"),
    ("reference", "model"),
    ("value", "model"),
    ("rollouts",),
)
"""Settings that may be local paths: relative to the recipe's folder, or else to the working directory."""


def load_as(kind: type[T], path: str | Path, overrides: Overrides = ()) -> T:
    """Loads a YAML file with overrides as a recipe, or as something else made of slots and settings.

    Args:
        kind: a dataclass whose fields are slots by name, settings, and ``name`` and ``path`` of the file. It may raise
            ``RecipeConflict``.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    path = Path(path)
    return _RecipeReader(read_document(path, overrides), path, kind).build()


def run_file(kind: type[T], path: str | Path, overrides: Overrides, run: Callable[[T], Result]) -> Result:
    """Loads a YAML file and runs it; errors of the run carry the file and line of the setting at fault.

    Args:
        kind: as in :func:`load_as`.
        run: called with the recipe that was loaded.

    Raises:
        UserError: if the file is wrong, or the run finds something wrong; the message says where and what to change.
    """
    recipe = load_as(kind, path, overrides)
    try:
        return run(recipe)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error


def read_part(document: Document, path: Path, kind: type[Any], location: Location, entry: Any) -> Part:
    """Reads one entry of a document as a part of the slot that its location names last.

    Args:
        path: the file, beside which local paths are looked for.
        kind: the kind of recipe, which says where bare names are looked up.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    reader = PartReader(document, path, kind)
    part = reader.part(location, entry)
    reader.raise_if_any()
    assert part is not None
    return part


def placed(error: UserError, path: Path, overrides: Overrides = ()) -> UserError:
    """Adds the place of the key that each problem begins with to an error: ``grpo.yaml:3:3: policy.model: ...``."""
    document = read_document(path, overrides)

    def with_place(problem: str) -> str:
        key, colon, message = problem.partition(": ")
        location = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
        return document.problem(location, message) if colon and location[0] in document.data else problem

    return UserError(map(with_place, error.problems))


class _RecipeReader(PartReader):
    """Reads a whole document: parts into slots, everything else into sections."""

    def build(self) -> Any:
        """Builds the recipe, or raises all problems at once."""
        fields: dict[str, Any] = {}
        hints = typing.get_type_hints(self.kind, include_extras=True)
        known = [f.name for f in dataclasses.fields(self.kind) if f.name not in ("name", "path")]
        optional = [f.name for f in dataclasses.fields(self.kind) if not _has_no_default(f)]
        self._check_required()
        for name, value in self.document.data.items():
            if name not in known:
                self.problems.append(((name,), f"unknown key; {hint_for((), self.kind)(name, known)}"))
            elif name in self.kind.modules and value is None and name in optional:
                continue  # null: the default of the slot
            elif name in self.kind.modules:
                fields[name] = self.parts((name,), value) if SLOTS[name].several else self.part((name,), value)
            else:
                fields[name] = self.settings(name, hints[name], value)
        self.raise_if_any()
        try:
            return self.kind(**fields, name=self.path.stem, path=self.path.resolve())
        except RecipeConflict as error:
            self.problems.extend(error.conflicts)
        self.raise_if_any()
        raise AssertionError("unreachable: conflicts are problems")

    def _check_required(self) -> None:
        required = [f.name for f in dataclasses.fields(self.kind) if _has_no_default(f)]
        for name in required:
            if name not in self.document.data:
                self.problems.append(((), f"the section {name!r} is missing"))

    def settings(self, name: str, annotation: Any, value: Any) -> Any:
        """Reads a section, or a setting at the top."""
        value = {} if value is None and dataclass_in(annotation) and name != "evaluate" else value
        checked, problems = validate(annotation, self._local_paths((name,), value), hint_for((name,), self.kind))
        self.problems.extend(((name, *location), message) for location, message in problems)
        return checked

    def _local_paths(self, location: Location, value: Any) -> Any:
        if location in PATHS and isinstance(value, str):
            return self.local_path(location, value)
        if isinstance(value, dict):
            return {key: self._local_paths((*location, key), child) for key, child in value.items()}
        return value


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
