"""Reads strict YAML: YAML 1.2 scalars, no duplicate keys, a place for every key, dotted overrides, suggestions.

PyYAML reads YAML 1.1, where ``1e-5`` is a string, ``010`` is eight and ``on`` is true; here scalars follow the core
schema of YAML 1.2. A :class:`Document` keeps the place (``file:line:column``) of each key through merging and
overriding, so that messages about the data can say where a problem is.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import RecipeError
from posttrain.recipe.file_text import text_of

Location = tuple[str | int, ...]
"""Path to a value from the top: keys and list indices."""


@dataclass(frozen=True)
class Document:
    """Plain data (dicts, lists, scalars) and the place of every key and list item in it."""

    data: dict[str, Any]
    places: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """``file:line:column`` of the innermost key on the way to ``location`` that is in a file."""
        while location and location not in self.places:
            location = location[:-1]
        return self.places.get(location, "recipe")

    def inside(self, location: Location) -> Document:
        """The mapping at ``location`` as a document of its own; its keys keep their places."""
        data: Any = self.data
        for step in location:
            data = child(data, step)
        depth = len(location)
        places = {at[depth:]: place for at, place in self.places.items() if at[:depth] == location}
        return Document(data if isinstance(data, dict) else {}, places)

    def problem(self, location: Location, message: str) -> str:
        """Writes a problem as one line: place, dotted key, message."""
        place, key, message = self.place(location), dotted(location), shorten(message, 1000)
        named = not key or place.startswith(f"{COMMAND_LINE}: --{key}=")
        return f"{shorten(place)}: {message}" if named else f"{place}: {key}: {message}"


Overrides = Sequence[str | Document]
"""Changes to a file: documents first, in their order, and then ``--key.path=value`` arguments."""

COMMAND_LINE = "command line"


def shorten(text: str, longest: int = 200) -> str:
    """Cuts the end off a long text."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def single(location: Location, value: Any, place: str) -> Document:
    """Makes a document with a single value."""
    data: Any = value
    for step in reversed(location):
        data = {step: data}
    return Document(data, {location[:depth]: place for depth in range(len(location) + 1)})


def dotted(location: Location) -> str:
    """Writes ``("loss", 0, "low")`` as ``loss.0.low``, as overrides do."""
    return ".".join(map(str, location))


RENAMED = {"n": "completions", "branches": "completions"}
"""Former names of keys (``evaluate.n``, ``value.branches.n``, ``label.branches``), with the present one."""


def suggestion(name: object, known: Iterable[str]) -> str:
    """Writes ``did you mean 'x'?`` for a near miss, otherwise the known names."""
    known = sorted(set(known))
    if RENAMED.get(str(name)) in known:
        return f"did you mean {RENAMED[str(name)]!r}, which was {str(name)!r} before?"
    lowered = {candidate.lower(): candidate for candidate in known}
    if match := difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6):
        return f"did you mean {lowered[match[0]]!r}?"
    return f"known: {', '.join(known)}" if known else "there are none"


DEEPEST = 32
"""Most levels of mappings and lists inside each other."""
MOST_VALUES = 100_000
"""Most values in a file. A few lines of aliases to aliases would otherwise become billions of them."""


class _CoreSchema(yaml.SafeLoader):
    """PyYAML's parser with the implicit types of the YAML 1.2 core schema and a limit of depth."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a node; refuses more than ``DEEPEST`` levels, for which Python's stack would be too small."""
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels of nesting", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _float(text: str) -> float:
    if text.lower().endswith((".inf", ".nan")):
        return math.nan if text.lower() == ".nan" else math.copysign(math.inf, -1.0 if text[0] == "-" else 1.0)
    return float(text)


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # tag: regular expression, first characters, constructor
    "null": (r"null|Null|NULL|~|", "nN~", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        _float,
    ),
}
_TAG = "tag:yaml.org,2002:"
for _name, (_pattern, _first, _) in _SCALARS.items():
    _CoreSchema.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])
_CONSTRUCTORS: dict[str, Callable[[str], Any]] = {_TAG + name: make for name, (_, _, make) in _SCALARS.items()}
_CONSTRUCTORS[_TAG + "str"] = str


_NO_TEXT = re.compile("[\\x00\\ud800-\\udfff]")
"""Characters that no path and no UTF-8 text can have: NUL, and halves of surrogate pairs."""


@dataclass
class _Builder:
    """Turns parsed nodes into data, and notes places and problems."""

    file: str
    places: dict[Location, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    open_nodes: set[int] = field(default_factory=set)
    values: int = 0  # number of values so far, those behind aliases included

    def place(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def build(self, node: yaml.Node, location: Location) -> Any:
        self.values += 1
        if self.values > MOST_VALUES:
            raise RecipeError(f"{self.place(node)}: more than {MOST_VALUES:,} values, counting those behind aliases")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open_nodes:
            self.problems.append(f"{self.place(node)}: an alias contains itself")
            return None
        self.open_nodes.add(id(node))
        data = self.mapping(node, location) if isinstance(node, yaml.MappingNode) else self.sequence(node, location)
        self.open_nodes.remove(id(node))
        return data

    def scalar(self, node: yaml.ScalarNode) -> Any:
        make = _CONSTRUCTORS.get(node.tag)
        if make is None:
            self.problems.append(f"{self.place(node)}: the tag {node.tag!r} has no meaning here")
            return None
        if character := _NO_TEXT.search(node.value):
            self.problems.append(f"{self.place(node)}: text with the character U+{ord(character[0]):04X}")
            return None
        try:
            return make(node.value)
        except ValueError:  # an explicit tag on text of another type, or a number of thousands of digits
            kind, text = node.tag.removeprefix(_TAG), shorten(repr(node.value))
            self.problems.append(f"{self.place(node)}: {text} is not of type {kind}")
            return None

    def sequence(self, node: yaml.Node, location: Location) -> list[Any]:
        for index, item in enumerate(node.value):
            self.places[(*location, index)] = self.place(item)
        return [self.build(item, (*location, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.build(key_node, ()) if isinstance(key_node, yaml.ScalarNode) else None
            here = (*location, key if isinstance(key, str) else str(key_node.value))
            if not isinstance(key, str):
                self.problems.append(f"{self.place(key_node)}: {dotted(here)}: a key is text; put it in quotes")
            elif key in data:
                first = self.places[here]
                self.problems.append(f"{self.place(key_node)}: {dotted(here)}: key given twice (first at {first})")
            else:
                self.places[here] = self.place(key_node)
                data[key] = self.build(value_node, here)
        return data


def read(path: Path) -> Document:
    """Reads the mapping in a YAML file.

    Raises:
        RecipeError: if there is no such file, it is not YAML, or it has duplicate keys or keys that are not text. The
            message lists all problems at once.
    """
    return parse(_text(path), str(path))


def parse(text: str, file: str) -> Document:
    """Reads the mapping in a YAML text, which messages call ``file``. Raises like :func:`read`."""
    builder = _Builder(file)
    node = _compose(text, file)
    data = {} if node is None else builder.build(node, ())
    if not builder.problems and data is not None and not isinstance(data, dict):
        builder.problems.append(f"{file}:1:1: a recipe is a mapping of keys to values, not a {_kind(data)}")
    if builder.problems:
        raise RecipeError(builder.problems)
    builder.places[()] = f"{file}:1:1"
    return Document(data or {}, builder.places)


def _text(path: Path) -> str:
    try:
        return text_of(path)
    except FileNotFoundError:
        near = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f"; {suggestion(path.name, near)}" if near else ""
        raise RecipeError(f"{path}: no such file{hint}") from None


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return _CoreSchema(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        context = f" {error.context}" if error.context else ""
        raise RecipeError(f"{place}: not valid YAML: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise RecipeError(f"{file}:{line}: not valid YAML: {error.reason} (U+{code:04X})") from None


def _kind(data: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", int: "number", float: "number", bool: "truth value"}
    return names.get(type(data), "null")


def merge(base: Document, top: Document, replaces: Callable[[Location, Mapping[str, Any]], bool]) -> Document:
    """Puts ``top`` over ``base``: merges mappings key by key and replaces everything else.

    An empty mapping of ``top`` empties the base's mapping.

    Args:
        replaces: ``replaces(location, mapping)`` is True if a mapping of ``top`` replaces the base's as a whole.
    """

    def join(location: Location, under: Any, over: Any) -> Any:
        emptied = over == {} and location != ()
        if not (isinstance(under, dict) and isinstance(over, dict)) or emptied or replaces(location, over):
            return over
        return under | {key: join((*location, key), under.get(key), value) for key, value in over.items()}

    data = join((), base.data, top.data)
    places = {at: place for at, place in (base.places | top.places).items() if _exists(data, at)}
    return Document(data, places)


def _exists(data: Any, location: Location) -> bool:
    for step in location:
        data = child(data, step)
        if data is ABSENT:
            return False
    return True


ABSENT: Any = object()
"""Result of :func:`child` where there is no value."""


def child(data: Any, step: str | int) -> Any:
    """The value at a key or an index; ``ABSENT`` if there is none."""
    if isinstance(data, list):
        return data[step] if isinstance(step, int) and 0 <= step < len(data) else ABSENT
    return data.get(step, ABSENT) if isinstance(data, dict) else ABSENT


def override(document: Document, arguments: Iterable[str]) -> Document:
    """Applies ``--key.path=value`` arguments, values parsed as YAML; ``--loss.0.low=0.1`` enters a list.

    Raises:
        RecipeError: if arguments are malformed or contradict each other. Unknown keys are found later, by the reader of
            the document; their place is then the command line.
    """
    problems: list[str] = []
    arguments_by_key: dict[str, str] = {}
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in arguments_by_key:
            problems.append(f"{COMMAND_LINE}: {argument}: given twice (first as {arguments_by_key[key]})")
            continue
        arguments_by_key[key] = argument
        try:
            document = _override(document, argument)
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    return document


def _override(document: Document, argument: str) -> Document:
    place = f"{COMMAND_LINE}: {argument}"
    key, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals or not all(key.split(".")):
        raise RecipeError(f"{place}: an override is written as --section.key=value")
    builder = _Builder(place)
    node = _compose(text, place)
    value = None if node is None else builder.build(node, ())
    if builder.problems:
        raise RecipeError(builder.problems)
    places = dict(document.places)
    location: Location = ()

    def put(under: Any, steps: list[str]) -> Any:
        nonlocal location
        if not steps:
            return value
        step = _step(under, steps[0], location, place)
        location = (*location, step)
        places.setdefault(location, place)
        if isinstance(under, list):
            return [put(item, steps[1:]) if i == step else item for i, item in enumerate(under)]
        return {**(under or {}), step: put((under or {}).get(step), steps[1:])}

    data = put(document.data, key.split("."))
    outside = {at: before for at, before in places.items() if at[: len(location)] != location}
    return Document(data, outside | {location: place})


def _step(under: Any, name: str, location: Location, place: str) -> str | int:
    if isinstance(under, list):
        if not name.isdecimal() or int(name) >= len(under):
            raise RecipeError(
                f"{place}: {dotted(location)} is a list of {len(under)}; "
                f"name an item by its index, as in --{dotted((*location, 0))}=..."
            )
        return int(name)
    if under is not None and not isinstance(under, dict):
        raise RecipeError(f"{place}: {dotted(location)} is {under!r}, which has no key {name!r}")
    return name
