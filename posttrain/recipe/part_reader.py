"""Reads the parts of a document: finds their callables, checks their options, collects problems with their place."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import RecipeError
from posttrain.option_types import Inner
from posttrain.recipe.part import SLOTS, Part, Slot
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
from posttrain.recipe.validation import Problems, validate
from posttrain.recipe.yaml_reader import COMMAND_LINE, Document, Location
from posttrain.system.places import expanded, is_there

T = TypeVar("T")

BATCH_VERIFIER = ("prompts", "completions", "completion_ids", "trainer_state")
"""Parameters, besides columns, of a reward function of TRL's signature."""


class PartReader:
    """Reads the parts of a document and collects the problems that it finds.

    Args:
        path: the file, beside which local paths are looked for.
        kind: the kind of recipe, which says where each slot looks bare names up.
    """

    def __init__(self, document: Document, path: Path, kind: type[Any]) -> None:
        self.document = document
        self.path = path
        self.kind = kind
        self.problems: Problems = []

    def raise_if_any(self) -> None:
        """Raises one error for all problems so far, in the order of their lines."""
        if not self.problems:
            return
        lines = [self.document.problem(location, message) for location, message in self.problems]
        raise RecipeError(sorted(dict.fromkeys(lines), key=_by_line))

    def parts(self, location: Location, entries: Any, inner: Inner | None = None) -> tuple[Part, ...]:
        """Reads a list of parts; see :meth:`part`."""
        if entries is None:
            return ()
        if not isinstance(entries, list):
            message = f"should be a list of parts, such as [{{use: name}}] (got {entries!r})"
            self.problems.append((location, message))
            return ()
        parts = [self.part((*location, i), entry, inner) for i, entry in enumerate(entries)]
        return tuple(part for part in parts if part is not None)

    def part(self, location: Location, entry: Any, inner: Inner | None = None) -> Part | None:
        """Reads one entry ``{use: name, <options>, <settings of the slot>}``; returns None if it has problems.

        Args:
            inner: mark of the option whose value the entry is. Default: the entry is in the slot that the location
                names.
        """
        slot_name = next(str(step) for step in reversed(location) if isinstance(step, str))
        slot, module = (Slot(inner.takes), inner.module) if inner else (SLOTS[slot_name], self.kind.modules[slot_name])
        if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
            got = "`use` is missing" if isinstance(entry, dict) and "use" not in entry else f"got {entry!r}"
            got = "got null, but this kind of recipe cannot go without" if entry is None else got
            self.problems.append((location, f"a part is written as {{use: name, option: value}} ({got})"))
            return None
        folders = self.folders((*location, "use"))
        spec = self._attempt((*location, "use"), lambda: specify(entry["use"], module, folders))
        target = self._attempt((*location, "use"), lambda: resolve(spec)) if spec else None
        settings = self._part_settings(location, slot, entry)
        if target is None or not self._fits(location, slot_name, slot, target):
            return None
        options = {name: value for name, value in entry.items() if name != "use" and name not in slot.settings}
        inner_parts = self._inner_parts(location, target, options)
        inner_names = [name for name in inner_slots(target) if name in options]
        plain = {name: value for name, value in options.items() if name not in inner_names}
        self._find_local_options(location, target, plain)
        passed = [*_passed(slot, target), *inner_names]
        checked, problems = check_options(target, plain, passed, beside=slot.settings, complete=slot_name != "verify")
        self.problems.extend(((*location, *at), message) for at, message in problems)
        if problems:
            return None
        return Part.of(target, settings={"name": entry["use"], "spec": spec, **settings}, **checked, **inner_parts)

    def _inner_parts(self, location: Location, target: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the options that are parts themselves, such as the score of a preference loss."""
        inner_parts: dict[str, Any] = {}
        for name, mark in inner_slots(target).items():
            if options.get(name) is not None:
                place, value = (*location, name), options[name]
                value = [value] if mark.several and isinstance(value, dict) else value
                inner_parts[name] = self.parts(place, value, mark) if mark.several else self.part(place, value, mark)
        return inner_parts

    def _find_local_options(self, location: Location, target: Any, options: dict[str, Any]) -> None:
        """Replaces local paths among the options, alone or in lists, by absolute ones, if there is such a file."""
        for name in local_options(target):
            value = options.get(name)
            if isinstance(value, str):
                options[name] = self.local_path((*location, name), value)
            elif isinstance(value, list):
                options[name] = [
                    self.local_path((*location, name, index), item) if isinstance(item, str) else item
                    for index, item in enumerate(value)
                ]

    def _part_settings(self, location: Location, slot: Slot, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the fields of :class:`Part` that an entry sets beside its options."""
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
        """Checks that the part can be called with the arguments that its slot passes."""
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

    def local_path(self, location: Location, value: str) -> str:
        """The absolute path of a local file, folder or ``file.py:function``; other text is returned unchanged."""
        if not value:
            return value  # which its setting refuses: it would be the working folder
        if ".py:" in value:
            return self._attempt(location, lambda: _absolute_function(value, self.folders(location))) or value
        path = expanded(value)
        existing = next((folder / path for folder in self.folders(location) if is_there(folder / path)), None)
        return str(existing.resolve()) if existing else value

    def folders(self, location: Location) -> list[Path]:
        """Folders in which a relative path is looked for.

        The first is that of the file which names the path; for a path from the command line, the working directory.
        """
        place = self.document.place(location)
        if place.startswith(COMMAND_LINE):
            return [Path.cwd(), self.path.parent]
        naming_file = Path(place.rsplit(":", 2)[0])
        return list(dict.fromkeys([naming_file.parent, self.path.parent, Path.cwd()]))

    def _attempt(self, location: Location, action: Callable[[], T]) -> T | None:
        """Calls a function; if it raises a RecipeError, notes its problems at the location and returns None."""
        try:
            return action()
        except RecipeError as error:
            self.problems.extend((location, problem) for problem in error.problems)
            return None


def _passed(slot: Slot, target: Any) -> list[str]:
    """Names of parameters that the slot passes, and that are no options therefore."""
    if slot.takes is None:
        return [*list(parameters(target))[:1], *BATCH_VERIFIER]
    if isinstance(target, type):  # the loop calls the object; its constructor has options alone
        return [*slot.by_name]
    return [*positional(target), *slot.by_name]


def _absolute_function(value: str, folders: Iterable[Path]) -> str:
    file, _, name = value.rpartition(":")
    return f"{find_file(file, folders)}:{name}"


def _by_line(problem: str) -> tuple[bool, str, int, int]:
    """Key that sorts messages: the command line first, then each file by its lines."""
    file, _, rest = problem.partition(":")
    line, column = (int(n) if n.isdecimal() else 0 for n in (rest.split(":") + ["", ""])[:2])
    return file != COMMAND_LINE, file, line, column
