"""Writes `docs/settings.md`, the list of all settings, from the code: ``python scripts/settings.py [--check]``.

``--check`` writes nothing and exits with 1 if the file is out of date; ``tests/test_docs.py`` runs it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from generated import write_or_check
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from posttrain.commands.iterate_plan import IterateRecipe
from posttrain.commands.label import LabelRecipe
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.option_types import LARGEST_COUNT
from posttrain.recipe.part import SLOTS
from posttrain.recipe.validation import dataclass_in
from posttrain.reports.decoding_suite import DecodeSuite
from posttrain.reports.reward_suite import RewardSuite
from posttrain.reports.value_suite import ValueSuite
from posttrain.reports.verifier_suite import VerifierSuite
from posttrain.serving.recipe import ServeRecipe
from posttrain.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "settings.md"

KINDS = {
    "posttrain train": Recipe,
    "posttrain decode": DecodeRecipe,
    "posttrain serve": ServeRecipe,
    "posttrain label": LabelRecipe,
    "posttrain iterate": IterateRecipe,
    "posttrain eval, decoding": DecodeSuite,
    "posttrain eval, values": ValueSuite,
    "posttrain eval, rewards": RewardSuite,
    "posttrain eval, verifiers": VerifierSuite,
}

INTRODUCTION = """\
# Settings

This page is generated from the code by `python scripts/settings.py`. Do not edit it.

It lists the settings of every kind of YAML file. A setting in a section is written with a dot, as on the command line:
`--optimizer.learning_rate=1e-5`. Parts, which are written `{use: name}`, are listed in [slots.md](slots.md).
`posttrain show FILE` prints the settings of a file beside their defaults. Unknown settings are errors."""


def document() -> str:
    """The whole page."""
    lines, described = INTRODUCTION.splitlines(), {}
    for command, kind in KINDS.items():
        lines += ["", f"## {command}", "", sentence(kind), ""]
        lines += table(kind, "")
        for name, section in sections(kind):
            if section in described:
                lines += ["", f"`{name}` has the settings of [`{described[section]}`](#{anchor(described[section])})."]
            else:
                described[section] = name
                lines += ["", f"### {name}", "", sentence(section), "", *table(section, f"{name}.")]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """The anchor that Markdown gives a title."""
    return title.lower().replace(".", "")


def sections(kind: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The sections of a file, and the sections inside them, with their dotted names."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in settings(kind):
        section = section_in(hints[name])
        if section is not None:
            yield f"{at}{name}", section
            yield from sections(section, f"{at}{name}.")


def section_in(annotation: Any) -> Any:
    """The section in an annotation, alone, in a list or by name; None if there is none."""
    if typing.get_origin(annotation) in (tuple, dict):
        return next(filter(None, map(section_in, typing.get_args(annotation))), None)
    section = dataclass_in(annotation)
    return section if hasattr(section, "__pydantic_fields__") else None


def settings(kind: Any) -> list[str]:
    """Names of the settings of a file or section that are no parts."""
    parts = SLOTS.keys() if hasattr(kind, "modules") else ()
    return [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in ("name", "path", *parts) or f.name == "name" and not parts
    ]


def table(kind: Any, at: str) -> Iterator[str]:
    """The table of the settings of a file or section that are no sections themselves."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    rows = [name for name in settings(kind) if section_in(hints[name]) is None]
    if rows:
        yield from ("| setting | values | default | meaning |", "|---|---|---|---|")
    # a subclass has descriptions of the fields that it declares; inherited ones are its bases'
    inherited = {
        n: f
        for base in reversed(kind.__mro__)
        for n, f in getattr(base, "__pydantic_fields__", {}).items()
        if f.description
    }
    for name in rows:
        field = fields[name] if fields[name].description else inherited.get(name, fields[name])
        cells = [
            f"`{at}{field.alias or name}`",
            values(hints[name], field),
            default(field),
            meaning(f"{kind.__name__}.{name}", field),
        ]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def values(annotation: Any, field: FieldInfo) -> str:
    """The values that a setting takes: its type and its bounds."""
    inside = kind_of(annotation)
    outside = [limit for limit in limits(field.metadata) if limit not in inside]
    return ", ".join([inside, *outside])


def limits(metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds of a number in words."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for mark in metadata:
        bounds = mark.metadata if isinstance(mark, FieldInfo) else [mark]
        for bound, (name, sign) in itertools.product(bounds, signs.items()):
            if hasattr(bound, name) and getattr(bound, name) != LARGEST_COUNT:
                yield f"{sign} {getattr(bound, name):,}"


def kind_of(annotation: Any) -> str:
    """An annotation in words."""
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true, false",
        type(None): "null",
        Any: "any",
        Path: "path",
    }
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([kind_of(arguments[0]), *limits(arguments[1:])])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(kind_of, arguments))
    if origin is tuple:
        return "list of " + (kind_of(arguments[0]) if arguments[-1] is ... else " and ".join(map(kind_of, arguments)))
    if origin is dict:
        return "mapping"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """A default as it is written in YAML."""
    if field.is_required():
        return "required"
    value = TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json")
    if isinstance(value, str):
        return f"`{json.dumps(value) if value.strip() != value else value}`"
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix(chr(10)).removesuffix('...').strip()}`"


def meaning(name: str, field: FieldInfo) -> str:
    """The description of a setting, in one line of Markdown."""
    if not field.description:
        raise SystemExit(f"scripts/settings.py: {name} has no description")
    return " ".join(field.description.split()).replace("``", "`")


def sentence(kind: Any) -> str:
    """The first paragraph of a docstring, in one line of Markdown."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()).replace("``", "`")


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, document()))
