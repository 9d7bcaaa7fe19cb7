"""The suite ``decode``: which decoders are compared, each at which strengths, beside plain samples of the policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from posttrain.data.read import find
from posttrain.decoding.checks import decoder_conflicts
from posttrain.decoding.recipe import DecodeRecipe, DecodeSettings
from posttrain.errors import RecipeError
from posttrain.option_types import OutputPath, PlaceName
from posttrain.recipe import sections
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import load_as, read_part
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import Document, Location, Overrides

PLAIN = "plain samples"
"""Name of the policy's own completions in tables and pictures."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class ComparedSection:
    """A decoder to compare with plain samples, at one strength or at several."""

    name: str | None = None
    """Name in tables and pictures. Default: the name of the recipe's file, or of the decoder."""
    recipe: PlaceName | None = None
    """Decode recipe, such as ``../recipes/decode/vas.yaml``, of which only the decoder is taken."""
    decoder: dict[str, Any] | None = None
    """Decoder, written as in a decode recipe."""
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """One option of the decoder with its values, each a variant: ``{strength: [0, 1]}``, ``{score.alpha: [0, 1]}``."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class DecodeReportSection:
    """The report of a decode suite."""

    folder: OutputPath | None = None
    """Folder of the report. Default: ``reports/<suite's name>``. A report in it is replaced."""


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class DecodeSuite(DecodeSettings):
    """Compares decoders on held-out prompts: reward, KL to the policy, tokens, scorer calls, seconds."""

    suite: Literal["decode"]
    """Kind of the suite."""
    decode: tuple[ComparedSection, ...] = ()
    """Decoders to compare with plain samples."""
    report: DecodeReportSection = field(default_factory=DecodeReportSection)

    name: str = "decode"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        if not self.verify:
            yield ("verify",), "is empty: nothing says which completions are good"
        if self.sampling.temperature == 0 and self.completions > 1:
            yield ("completions",), f"at temperature 0 all {self.completions} completions of a prompt are equal"
        for index, entry in enumerate(self.decode):
            if (entry.recipe is None) == (entry.decoder is None):
                yield ("decode", index), "needs either a `recipe` or a `decoder` of its own: give one of them"
            if len(entry.sweep) > 1:
                yield (
                    ("decode", index, "sweep"),
                    f"only one option can be swept, and here are {len(entry.sweep)} options",
                )
            for knob, values in entry.sweep.items():
                if not values:
                    yield ("decode", index, "sweep", knob), "is empty"

    @property
    def folder(self) -> Path:
        """Folder that the report is written to."""
        return Path(self.report.folder or Path("reports") / self.name)

    @property
    def resolved(self) -> dict[str, Any]:
        """Settings as plain data, defaults included."""
        names = ("suite", "policy", "data", "decode", "sampling", "engine", "completions", "report", "seed", "verify")
        return self.plain(*names)


class Variant(NamedTuple):
    """A decoder at one strength."""

    method: str
    knob: str | None  # name of the option that is swept
    value: Any  # value of that option
    decoder: Part | None  # None: plain samples

    @property
    def label(self) -> str:
        """Name and strength, as in ``blockwise_cd, branch 8``."""
        return self.method if self.knob is None else f"{self.method}, {self.knob} {as_yaml(self.value)}"


class Comparison(NamedTuple):
    """A decode suite and the variants that it measures, plain samples first."""

    suite: DecodeSuite
    variants: list[Variant]


def as_yaml(value: Any) -> str:
    """Formats an option's value as a suite has it in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_suite(path: str | Path, overrides: Overrides = ()) -> Comparison:
    """Reads the decode suite in a YAML file, with the decoders that it names in other files.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    path = Path(path)
    suite = load_as(DecodeSuite, path, overrides)
    document = read_document(path, overrides)
    variants, problems = [Variant(PLAIN, None, None, None)], []
    for index, entry in enumerate(suite.decode):
        earlier = {variant.method for variant in variants}
        for knob, value in _strengths(entry):
            try:
                variants.append(_variant(suite, document, path, index, knob, value))
            except RecipeError as error:
                problems += error.problems
        if variants[-1].method in earlier and not problems:
            message = f"an earlier entry is also called {variants[-1].method!r}: give this one a `name`"
            problems.append(document.problem(("decode", index), message))
    if problems:
        raise RecipeError(dict.fromkeys(problems))
    return Comparison(suite, variants)


def _strengths(entry: ComparedSection) -> list[tuple[str | None, Any]]:
    """Lists the swept option with each of its values, or one (None, None) if no option is swept."""
    return [(knob, value) for knob, values in entry.sweep.items() for value in values] or [(None, None)]


def _variant(suite: DecodeSuite, document: Document, path: Path, index: int, knob: str | None, value: Any) -> Variant:
    """Builds the decoder of an entry of ``decode`` with one value of its swept option."""
    entry, place = suite.decode[index], ("decode", index)
    if entry.recipe is not None:
        file = find(entry.recipe, path.parent)
        if file is None or not file.is_file():
            raise RecipeError(document.problem((*place, "recipe"), f"there is no file {entry.recipe!r}"))
        override = [] if knob is None else [f"--decoder.{knob}={json.dumps(value)}"]
        decoder, default = load_as(DecodeRecipe, file, override).decoder, file.stem
        if decoder is None:
            raise RecipeError(
                document.problem(
                    (*place, "recipe"), f"{file.name} has no decoder, and plain samples are measured anyway"
                )
            )
    else:
        changed = entry.decoder if knob is None else _with(entry.decoder, knob.split("."), value)
        decoder = read_part(document, path, DecodeSuite, (*place, "decoder"), changed)
        default = decoder.name
    conflicts = list(decoder_conflicts(decoder, suite.sampling, suite.engine))
    if conflicts:
        raise RecipeError(
            document.problem((*place, *at) if at[0] == "decoder" else at, message) for at, message in conflicts
        )
    return Variant(entry.name or default, knob, value, decoder)


def _with(data: Any, steps: Sequence[str], value: Any) -> Any:
    """Returns a copy of nested mappings with a value set at the path ``steps``."""
    if not steps:
        return value
    changed = copy.copy(data) if isinstance(data, dict) else {}
    changed[steps[0]] = _with(changed.get(steps[0]), steps[1:], value)
    return changed
