"""YAML -> a recipe: the file, its base, the overrides; every problem at once, each with its place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import RecipeError, UserError
from posttrain.option_types import Inner
from posttrain.recipe.part import SLOTS, Part, RecipeConflict, Slot
from posttrain.recipe.resolve import (
    check_options,
    find_file,
    inner_slots,
    local_options,
    parameters,
    positional,
    resolve,
    specify,
)
from posttrain.recipe.validation import Problems, dataclass_in, validate
from posttrain.recipe.yaml_reader import (
    COMMAND_LINE,
    Document,
    Location,
    Overrides,
    dotted,
    merge,
    override,
    read,
    suggestion,
)

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
"""Local paths, where they exist: relative to the recipe's folder, or else to the working directory."""
BATCH_VERIFIER = ("prompts", "completions", "completion_ids", "trainer_state")
"""What a reward function of TRL's signature is given beside columns."""
ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_steps": "steps",
    "num_generations": "completions",
    "n": "completions",
    "group_size": "completions",
    "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step",
    "num_iterations": "epochs",
    "ppo_epochs": "epochs",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "model_name_or_path": "policy.model",
    "model_name": "policy.model",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "output_dir": "run.folder",
    "save_steps": "run.save_every",
    "report_to": "run.trackers",
    "use_vllm": "engine.use",
    "reward_funcs": "verify",
}
"""What other toolkits call our settings."""


def load_as(kind: type[T], path: str | Path, overrides: Overrides = ()) -> T:
    """What a YAML file with overrides describes: a recipe, or something else made of slots and settings.

    Args:
        kind: a dataclass whose fields are slots by name, settings, and ``name`` and ``path`` of the file. It may raise
            ``RecipeConflict``.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    path = Path(path)
    return _Reader(read_document(path, overrides), path, kind).build()


def run_file(kind: type[T], path: str | Path, overrides: Overrides, run: Callable[[T], Result]) -> Result:
    """Reads what a YAML file describes and runs it; errors of the run carry the file and line of the setting at fault.

    Args:
        kind: as in :func:`load_as`.
        run: called with what was read.

    Raises:
        UserError: if the file is wrong, or the run finds something wrong; the message says where and what to change.
    """
    recipe = load_as(kind, path, overrides)
    try:
        return run(recipe)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error


def read_part(document: Document, path: Path, kind: type[Any], location: Location, entry: Any) -> Part:
    """The part that an entry somewhere in a document describes, for the slot that its location names last.

    Args:
        path: of the file, beside which local paths are looked for.
        kind: the kind of recipe, which says where bare names are looked up.

    Raises:
        RecipeError: one line for each problem in file, base and overrides, with its place and a suggestion.
    """
    reader = _Reader(document, path, kind)
    part = reader.part(location, entry)
    reader.raise_if_any()
    assert part is not None
    return part


def placed(error: UserError, path: Path, overrides: Overrides = ()) -> UserError:
    """An error of a run with the place of each key that a problem begins with: ``grpo.yaml:3:3: policy.model: ...``."""
    document = read_document(path, overrides)

    def with_place(problem: str) -> str:
        key, colon, message = problem.partition(": ")
        location = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
        return document.problem(location, message) if colon and location[0] in document.data else problem

    return UserError(map(with_place, error.problems))


def read_document(path: Path, overrides: Overrides) -> Document:
    """What a recipe says: the file over its base, under the overrides."""
    document = _with_lists(read_with_base(path))
    for over in overrides:
        if isinstance(over, Document):
            document = _with_lists(merge(document, _with_lists(over), _replaces))
    return _with_lists(override(document, [argument for argument in overrides if isinstance(argument, str)]))


def read_with_base(path: Path) -> Document:
    """The file over its ``base:``, which may not have a base of its own.

    A mapping that names its own ``use`` replaces the base's part instead of mixing options of two parts.
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
    """One part alone in a slot of several, as a list of one."""
    lone = {name for name, slot in SLOTS.items() if slot.several and isinstance(document.data.get(name), dict)}
    data = {name: [value] if name in lone else value for name, value in document.data.items()}
    places = {(at[0], 0, *at[1:]) if at and at[0] in lone else at: place for at, place in document.places.items()}
    return Document(data, places | {(name,): document.place((name,)) for name in lone})


class _Reader:
    """Checks a document piece by piece, collecting problems."""

    def __init__(self, document: Document, path: Path, kind: type[Any]) -> None:
        self.document = document
        self.path = path
        self.kind = kind
        self.problems: Problems = []

    def build(self) -> Any:
        fields: dict[str, Any] = {}
        hints = typing.get_type_hints(self.kind, include_extras=True)
        known = [f.name for f in dataclasses.fields(self.kind) if f.name not in ("name", "path")]
        self._check_top()
        for name, value in self.document.data.items():
            if name not in known:
                self.problems.append(((name,), f"unknown key; {_hint_for((), self.kind)(name, known)}"))
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

    def _check_top(self) -> None:
        required = [f.name for f in dataclasses.fields(self.kind) if _has_no_default(f)]
        for name in required:
            if name not in self.document.data:
                self.problems.append(((), f"the section {name!r} is missing"))

    def raise_if_any(self) -> None:
        """Tells all problems so far, in the order of their lines."""
        if not self.problems:
            return
        lines = [self.document.problem(location, message) for location, message in self.problems]
        raise RecipeError(sorted(dict.fromkeys(lines), key=_by_line))

    def settings(self, name: str, annotation: Any, value: Any) -> Any:
        """A section or a number at the top."""
        value = {} if value is None and dataclass_in(annotation) and name != "evaluate" else value
        checked, problems = validate(annotation, self._local_paths((name,), value), _hint_for((name,), self.kind))
        self.problems.extend(((name, *location), message) for location, message in problems)
        return checked

    def _local_paths(self, location: Location, value: Any) -> Any:
        if location in PATHS and isinstance(value, str):
            return self._local_path(location, value)
        if isinstance(value, dict):
            return {key: self._local_paths((*location, key), child) for key, child in value.items()}
        return value

    def _local_path(self, location: Location, value: str) -> str:
        if ".py:" in value:
            return self._attempt(location, lambda: _absolute_function(value, self.folders(location))) or value
        path = Path(value).expanduser()
        found = next((folder / path for folder in self.folders(location) if (folder / path).exists()), None)
        return str(found.resolve()) if found else value

    def folders(self, location: Location) -> list[Path]:
        """Where a relative path is looked for: first beside the file that names it, or for what the command line names
        in the working directory."""
        place = self.document.place(location)
        if place.startswith(COMMAND_LINE):
            return [Path.cwd(), self.path.parent]
        of_file = Path(place.rsplit(":", 2)[0]).parent
        return list(dict.fromkeys([of_file, self.path.parent, Path.cwd()]))

    def parts(self, location: Location, entries: Any, inner: Inner | None = None) -> tuple[Part, ...]:
        if entries is None:
            return ()
        if not isinstance(entries, list):
            message = f"should be a list of parts, such as [{{use: name}}] (got {entries!r})"
            self.problems.append((location, message))
            return ()
        found = [self.part((*location, i), entry, inner) for i, entry in enumerate(entries)]
        return tuple(part for part in found if part is not None)

    def part(self, location: Location, entry: Any, inner: Inner | None = None) -> Part | None:
        """The part of one entry ``{use: name, <options>, <settings of the slot>}``.

        Args:
            inner: the mark of the option whose value the entry is; default: the entry is in the slot that the location
                names.
        """
        slot_name = next(str(step) for step in reversed(location) if isinstance(step, str))
        slot, module = (Slot(inner.takes), inner.module) if inner else (SLOTS[slot_name], self.kind.modules[slot_name])
        if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
            got = "`use` is missing" if isinstance(entry, dict) and "use" not in entry else f"got {entry!r}"
            self.problems.append((location, f"a part is written as {{use: name, option: value}} ({got})"))
            return None
        folders = self.folders((*location, "use"))
        spec = self._attempt((*location, "use"), lambda: specify(entry["use"], module, folders))
        target = self._attempt((*location, "use"), lambda: resolve(spec)) if spec else None
        settings = self._part_settings(location, slot, entry)
        if target is None or not self._fits(location, slot_name, slot, target):
            return None
        given = {name: value for name, value in entry.items() if name != "use" and name not in slot.settings}
        inner_parts = self._inner_parts(location, target, given)
        of_parts = [name for name in inner_slots(target) if name in given]
        plain = {name: value for name, value in given.items() if name not in of_parts}
        for name in local_options(target):
            value = plain.get(name)
            if isinstance(value, str):
                plain[name] = self._local_path((*location, name), value)
            elif isinstance(value, list):
                places = [(*location, name, index) for index in range(len(value))]
                plain[name] = [
                    self._local_path(place, each) if isinstance(each, str) else each
                    for place, each in zip(places, value, strict=True)
                ]
        passed = [*_passed(slot, target), *of_parts]
        checked, problems = check_options(target, plain, passed, beside=slot.settings, complete=slot_name != "verify")
        self.problems.extend(((*location, *at), message) for at, message in problems)
        if problems:
            return None
        return Part.of(target, settings={"name": entry["use"], "spec": spec, **settings}, **checked, **inner_parts)

    def _inner_parts(self, location: Location, target: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those options that are parts themselves, such as the score of a preference loss."""
        found: dict[str, Any] = {}
        for name, mark in inner_slots(target).items():
            if given.get(name) is not None:
                place, value = (*location, name), given[name]
                value = [value] if mark.several and isinstance(value, dict) else value
                found[name] = self.parts(place, value, mark) if mark.several else self.part(place, value, mark)
        return found

    def _part_settings(self, location: Location, slot: Slot, entry: Mapping[str, Any]) -> dict[str, Any]:
        hints = typing.get_type_hints(Part, include_extras=True)
        settings: dict[str, Any] = {}
        for name in slot.settings:
            if name in entry and name == "weights":
                weights = [entry[name]] if isinstance(entry[name], dict) else entry[name]
                settings[name] = self.parts((*location, name), weights)
            elif name in entry and name == "normaliser":
                settings[name] = self.part((*location, name), entry[name])
            elif name in entry:
                settings[name], problems = validate(hints[name], entry[name])
                self.problems.extend(((*location, name, *at), message) for at, message in problems)
        return settings

    def _fits(self, location: Location, slot_name: str, slot: Slot, target: Any) -> bool:
        """Whether the part can be called with what its slot passes."""
        takes = slot.takes
        if not takes:  # a verifier takes columns by name, a prompt sampler is built by name
            return True
        call = functools.partial(target.__call__, None) if isinstance(target, type) else target
        asks = positional(call)
        if len(asks) == len(takes):
            return True
        fitting = [name for name in self.kind.modules if SLOTS[name].takes == tuple(asks)]
        hint = f"; it fits {' or '.join(f'`{name}`' for name in fitting)}" if fitting else ""
        self.problems.append(
            (
                (*location, "use"),
                f"takes ({', '.join(asks)}), but `{slot_name}` passes ({', '.join(takes)}){hint}. "
                "Hyper-parameters are keyword-only or have a default",
            )
        )
        return False

    def _attempt(self, location: Location, action: Any) -> Any:
        try:
            return action()
        except RecipeError as error:
            self.problems.extend((location, problem) for problem in error.problems)
            return None


def _passed(slot: Slot, target: Any) -> list[str]:
    """Parameters that are filled by the loop, not by options."""
    if slot.takes is None:
        return [*list(parameters(target))[:1], *BATCH_VERIFIER]
    if isinstance(target, type):  # the loop calls the object; its constructor has options alone
        return [*slot.by_name]
    return [*positional(target), *slot.by_name]


def _absolute_function(value: str, folders: Iterable[Path]) -> str:
    file, _, name = value.rpartition(":")
    return f"{find_file(file, folders)}:{name}"


def _hint_for(location: Location, kind: type[Any]) -> Any:
    """Suggestions for an unknown key: a near miss, the name in other toolkits, or where such a key does exist."""

    def hint(name: str, known: Iterable[str]) -> str:
        known = list(known)
        guess = suggestion(name, known)
        if guess.startswith("did"):
            return guess
        if (other := ELSEWHERE.get(name)) and tuple(other.split(".")) in _all_settings(kind):
            section, _, key = other.rpartition(".")
            return f"did you mean {key!r}?" if (section,) == location else f"it is {other!r} here"
        if other := next((dotted(at) for at in _all_settings(kind) if at[-1] == name and len(at) > 1), None):
            return f"there is {other!r}"
        return guess

    return hint


@functools.cache
def _all_settings(kind: type[Any]) -> tuple[Location, ...]:
    def inside(cls: Any, location: Location) -> Iterable[Location]:
        hints = typing.get_type_hints(cls)
        fields = {f.name for f in dataclasses.fields(cls)}
        for name in dict.fromkeys([*inspect.get_annotations(cls), *hints]):  # its own before those of its base
            if name not in fields:
                continue
            yield (*location, name)
            if (nested := dataclass_in(hints[name])) is not None and nested is not Part:
                yield from inside(nested, (*location, name))

    return tuple(inside(kind, ()))


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _by_line(problem: str) -> tuple[bool, str, int, int]:
    """Sorts messages: the command line first, then each file by its lines."""
    file, _, rest = problem.partition(":")
    line, column = (int(n) if n.isdecimal() else 0 for n in (rest.split(":") + ["", ""])[:2])
    return file != COMMAND_LINE, file, line, column
