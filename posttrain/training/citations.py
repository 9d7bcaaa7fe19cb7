"""Papers of a recipe: those that its file names, and those of what its parts do under the options that are set."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.recipe.part import Part, default_options
from posttrain.training.recipe import Recipe

ARXIV = re.compile(r"arXiv:\s?(\d{4}\.\d{4,5})")
POLICY_ONLY = ("loss", "advantage", "shape", "keep", "baseline", "regroup", "combine", "compare")
"""Slots that do not change a value model."""
SAMPLING_ONLY = ("rollout", "decoder")
"""Slots that a recipe over completions from a dataset does not use."""


def papers(recipe: Recipe, *, of_value: bool = False) -> list[str]:
    """Sources of a trained model: lines with a number of the arXiv, from the recipe's comments and its parts.

    A part's docstring also names papers of variants. A source is cited only if the part does what it describes: the
    option that it explains, or that stands before it, has the value in question.

    Args:
        of_value: the sources of the value model, without those of parts that change the policy alone.
    """
    comments = recipe.path.read_text(encoding="utf-8").splitlines() if recipe.path else []
    lines = [line.partition("#")[2] for line in comments if "#" in line]
    for part in parts_of(recipe, of_value=of_value):
        lines += sources(inspect.getdoc(part.target) or "", part.every_option, default_options(part.target))
    found: dict[str, str] = {}
    for line in lines:
        for identifier in ARXIV.findall(line):
            found.setdefault(identifier, line.strip().removeprefix("- "))
    return list(dict.fromkeys(found.values()))


def parts_of(recipe: Recipe, *, of_value: bool = False) -> Iterator[Part]:
    """The parts that a run uses, with weights and normalisers of loss terms and the parts in their options."""
    unused = POLICY_ONLY if of_value else ()
    unused += SAMPLING_ONLY if recipe.examples is not None else ()
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Part) and field.name not in unused and not _is_default(part, field):
                yield from _with_inner(part)


def _is_default(part: Part, field: dataclasses.Field[Any]) -> bool:
    """True for the part that a slot has by default: a recipe that does not choose it does not owe it to a paper."""
    if field.default_factory is dataclasses.MISSING:
        return False
    default = field.default_factory()
    return isinstance(default, Part) and default.target is part.target and not part.options


def _with_inner(part: Part) -> Iterator[Part]:
    yield part
    for value in (*part.weights, part.normaliser, *part.options.values()):
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, Part):
                yield from _with_inner(inner)


def sources(docstring: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yields the sources in a part's docstring that are true of its options.

    Args:
        options: all options with their values.
        defaults: the values that options have by default.
    """
    changed = {name for name, value in options.items() if value != defaults.get(name)}
    body, _, arguments = docstring.partition("\nArgs:\n")
    for sentence in _sentences(body.partition("\nRaises:\n")[0]):
        condition = ""
        for clause in re.split(r"(?<=\d{4})[.;] ", sentence):
            condition = _condition(clause) or condition
            if ARXIV.search(clause) and _applies(clause, condition, options, changed):
                yield clause
    name = ""
    for entry in _entries(arguments.partition("\nRaises:\n")[0]):
        if (head := re.match(r"(\w+): ", entry)) and not entry.startswith("- "):
            name = head[1]
        value = re.search(r"(?:^- |: )``([^`]+)``: ", entry)
        used = str(options.get(name)) == value[1] if value else name in changed
        if ARXIV.search(entry) and used and _right_values(entry, options):
            yield entry.removeprefix(f"{name}: ")


def _condition(clause: str) -> str:
    """The words before a colon in front of a source, which say of which variant it is; empty if there are none."""
    source = re.search(r"\b(?:19|20)\d\d\b|arXiv", clause)
    before, colon, _ = clause[: source.start() if source else 0].partition(": ")
    return before if colon else ""


def _applies(clause: str, condition: str, options: Mapping[str, Any], changed: set[str]) -> bool:
    """True unless a source is of another variant than the one that the options make."""
    if not _right_values(clause, options):
        return False
    if "with all defaults" in clause:
        return not any(isinstance(options[name], Part | list | tuple) for name in changed)
    words = re.findall(r"\w+", condition.lower())
    terms = {*words, "_".join(words)}  # "label smoothing" is the option label_smoothing
    values = {str(value).lower() for value in options.values() if isinstance(value, str)}
    return not condition or bool(changed & terms) or bool(values & terms)


def _right_values(text: str, options: Mapping[str, Any]) -> bool:
    """True if every ``option: value`` in the text is how the option is set."""
    named = re.findall(r"``(\w+): (\w+)``", text)
    return all(str(options[name]).lower() == value.lower() for name, value in named if name in options)


def _sentences(text: str) -> Iterator[str]:
    """Yields lines; one that does not end with a full stop is joined to the next."""
    joined = ""
    for line in text.splitlines():
        joined = f"{joined} {line.strip()}".strip()
        if not line.strip() or line.rstrip().endswith("."):
            if joined:
                yield joined
            joined = ""
    if joined:
        yield joined


def _entries(arguments: str) -> Iterator[str]:
    """Yields the explanation of each option, and each bullet in it, as one line."""
    joined = ""
    for line in arguments.splitlines():
        starts = re.match(r"    \w+: |\s+- ", line)
        if starts and joined:
            yield joined
            joined = ""
        joined = f"{joined} {line.strip()}".strip()
    if joined:
        yield joined
