"""``posttrain show FILE``: prints what a YAML file runs, slot by slot, and which settings differ from defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.commands.evaluate import SUITES, suite_name
from posttrain.commands.iterate_plan import IterateRecipe
from posttrain.commands.label import LabelRecipe
from posttrain.decoding.recipe import DecodeRecipe
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import SLOTS, Part
from posttrain.recipe.resolve import inner_slots, parameters, resolve
from posttrain.recipe.yaml_reader import Document, Overrides
from posttrain.reports.decoding_suite import DecodeSuite, Variant, read_suite
from posttrain.serving.recipe import ServeRecipe
from posttrain.training.recipe import Recipe

_PAPER = re.compile(r"arXiv:|\b(19|20)\d\d\b.*\b(eq|section|table|appendix|chapter)\b", re.IGNORECASE)
_EQUATION = re.compile(r"^[^.:]{1,60}?\s(=|:=|<=)\s")


def show_file(path: Path, overrides: Overrides = (), console: Console | None = None) -> None:
    """Prints what a file describes: a recipe of any kind or an evaluation suite.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    kind = kind_of(read_document(path, overrides))
    if kind is DecodeSuite:
        suite, variants = read_suite(path, overrides)
        show(suite, console, variants)
    else:
        show(load_as(kind, path, overrides), console)


def kind_of(document: Document) -> type[Any]:
    """Decides by its keys which dataclass a file describes; a recipe for training if no key decides otherwise.

    Raises:
        RecipeError: if the file names a suite that does not exist.
    """
    keys = set(document.data)
    if "suite" in keys:
        return resolve(SUITES[suite_name(document)].kind)
    if "stages" in keys:
        return IterateRecipe
    if "label" in keys:
        return LabelRecipe
    if "server" in keys:
        return ServeRecipe
    return DecodeRecipe if "decoder" in keys and not keys & {"loss", "value_loss"} else Recipe


def show(recipe: Any, console: Console | None = None, variants: Sequence[Variant] = ()) -> None:
    """Prints a recipe or a suite.

    Args:
        recipe: a dataclass of slots and settings with ``name`` and ``path``.
        variants: the decoders that a suite compares.
    """
    console = console or Console()
    console.print(Text(recipe.name, style="bold"), Text(f"{_relative(str(recipe.path))}\n" if recipe.path else "\n"))
    for name in _names(recipe):
        if name == "rollout" and recipe.examples is not None:
            continue  # nothing is sampled
        if name in SLOTS:
            value = getattr(recipe, name)
            for part in (value,) if isinstance(value, Part) else value or ():
                console.print(part_view(name, part))
    for variant in variants:
        if variant.decoder is not None:
            console.print(Text(variant.label, style="bold"))
            console.print(part_view("decoder", variant.decoder))
    console.print(settings_table(recipe, without=("decode",) if variants else ()))


def _names(recipe: Any) -> list[str]:
    """Names of all keys that a file may have at the top."""
    return [f.name for f in dataclasses.fields(recipe) if f.name not in ("name", "path")]


def part_view(slot: str, part: Part) -> Group:
    """Shows a part: its source line, signature, first sentence, equation and paper, and the parts inside it."""
    file, line = _source(getattr(part.target, "makes", part.target))
    head = Text.assemble((f"{slot:<11}", "cyan"), (part.name, "bold"), f"  {_relative(file)}:{line}" if file else "")
    body: list[Any] = [Text(signature(part))]
    names = SLOTS[slot].settings if slot in SLOTS else ()
    values = {name: getattr(part, name) for name in names if name not in SLOTS}
    if values:
        body.append(Text("  ".join(f"{name}: {value}" for name, value in values.items()), style="dim"))
    body.extend(Text(line, style=style) for line, style in _description(part))
    body.extend(part_view(name, inner) for name, inner in inner_parts(part))
    body.extend(part_view("weights", weight) for weight in part.weights)
    body.extend([part_view("normaliser", part.normaliser)] if part.normaliser is not None else [])
    return Group(head, *(Padding(line, (0, 0, 0, 11)) for line in body), Text())


def inner_parts(part: Part) -> Iterator[tuple[str, Part]]:
    """Yields the options of a part that are parts themselves and that the recipe names."""
    for name in inner_slots(part.target):
        value = part.options.get(name, ())
        yield from ((name, inner) for inner in (value if isinstance(value, list | tuple) else (value,)))


def signature(part: Part) -> str:
    """Formats a call with the values in use, and a star after those that are not defaults.

    An example: ``clip(outputs, batch, *, low=0.2, high=0.28*)``.
    """
    shown: list[str] = []
    starred = False
    for name, p in parameters(part.target).items():
        if p.kind == p.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        if name in part.options:
            mark = "" if part.options[name] == p.default else "*"
            shown.append(f"{name}={as_text(part.options[name])}{mark}")
        elif p.default is not p.empty:
            shown.append(f"{name}={as_text(p.default)}")
        else:
            shown.append({p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + name)
    return f"{part.target.__name__}({', '.join(shown)})"


def as_text(value: Any) -> str:
    """Formats an option's value; a part is shown by its name and options."""
    if isinstance(value, tuple):
        return f"({', '.join(map(as_text, value))})"
    return str(value) if isinstance(value, Part) else getattr(value, "__name__", repr(value))


def settings_table(recipe: Any, without: Sequence[str] = ()) -> Table:
    """Makes a table of all settings; a star marks those that differ from their defaults."""
    table = Table("setting", "value", "default", box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for name in _names(recipe):
        if name not in SLOTS and name not in without:
            default = _default(next(f for f in dataclasses.fields(recipe) if f.name == name))
            for row in _rows(name, getattr(recipe, name), default):
                table.add_row(*row)
    return table


_NONE = object()


def _rows(name: str, value: Any, default: Any) -> Iterator[tuple[Text, str, str]]:
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            inner = _default(f) if default is None or default is _NONE else getattr(default, f.name)
            yield from _rows(f"{name}.{f.name}", getattr(value, f.name), inner)
    elif value == default:
        yield Text(f"  {name}", style="dim"), _shown(value), ""
    else:
        yield Text(f"* {name}", style="bold"), _shown(value), "" if default is _NONE else _shown(default)


def _default(f: dataclasses.Field[Any]) -> Any:
    """Returns the default of a section's field, also one wrapped in pydantic's ``Field``; ``_NONE`` without one."""
    default, factory = f.default, f.default_factory
    if hasattr(default, "get_default"):  # Field(default=..., ge=...)
        default = default.get_default(call_default_factory=True, validated_data={})  # type: ignore[union-attr]
        return _NONE if default is PydanticUndefined else default
    if factory is not dataclasses.MISSING:
        return factory()
    return _NONE if default is dataclasses.MISSING else default


def _shown(value: Any) -> str:
    """Formats a setting as JSON; printable text needs no quotes."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return plain if isinstance(plain, str) and plain.isprintable() else json.dumps(plain, ensure_ascii=False)


def _description(part: Part) -> Iterator[tuple[str, str]]:
    """Yields lines of a part's docstring with their style: its first sentence, equations and papers."""
    first, *paragraphs = (inspect.getdoc(part.target) or "").split("\n\n")
    if first:
        yield " ".join(first.split()), "italic"
    for paragraph in paragraphs:
        lines = [line.strip().replace("\\|", "|") for line in paragraph.splitlines()]
        if _EQUATION.match(lines[0]) and not lines[-1].endswith("."):
            yield from ((line, "green") for line in lines)
        else:
            yield from ((text, "blue") for text in _statements(lines) if _PAPER.search(text))


def _statements(lines: Iterable[str]) -> Iterator[str]:
    """Joins the lines of a paragraph up to each full stop or colon at a line's end."""
    statement: list[str] = []
    for line in lines:
        statement.append(line)
        if line.endswith((".", ":")):
            yield " ".join(statement)
            statement = []
    if statement:
        yield " ".join(statement)


def _source(target: Any) -> tuple[str, int]:
    """File and line of a part's source; empty if it has none."""
    try:
        return inspect.getsourcefile(target) or "", inspect.getsourcelines(target)[1]
    except (OSError, TypeError):  # built in, or made by a factory
        return "", 0


def _relative(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
