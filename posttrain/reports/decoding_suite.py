"""The suite ``decode``: policies completed by decoders, each at several strengths, beside plain samples."""

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
from posttrain.errors import RecipeError, UserError
from posttrain.recipe import sections
from posttrain.recipe.documents import read_document
from posttrain.recipe.loading import load_as, placed, read_part
from posttrain.recipe.part import Part
from posttrain.recipe.yaml_reader import Document, Location, Overrides

PLAIN = "plain samples"
"""What the policy's own completions are called in tables and pictures."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class Decoding:
    name: str | None = None
    """In tables and pictures. Default: the name of the recipe's file, or of the decoder."""
    recipe: str | None = None
    """A decode recipe, such as ``../recipes/decode/vas.yaml``, of which only the decoder is taken."""
    decoder: dict[str, Any] | None = None
    """A decoder, written as in a decode recipe."""
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """One option of the decoder with the values that it takes in turn: ``{strength: [0, 1, 2]}``, ``{score.alpha: [0,
    1]}``."""


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class DecodeReport:
    folder: str | None = None
    """Default: ``reports/<suite's name>``. A report that is there is replaced."""


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class DecodeSuite(DecodeSettings):
    """What decoders make of a policy on held-out prompts: reward, KL to the policy, tokens, scorer calls, seconds."""

    suite: Literal["decode"]
    decode: tuple[Decoding, ...] = ()  # beside plain samples
    report: DecodeReport = field(default_factory=DecodeReport)

    name: str = "decode"

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if not self.verify:
            yield ("verify",), "is empty: nothing says which completions are good"
        if self.sampling.temperature == 0 and self.completions > 1:
            yield ("completions",), f"at temperature 0 all {self.completions} completions of a prompt are equal"
        for index, entry in enumerate(self.decode):
            if (entry.recipe is None) == (entry.decoder is None):
                yield ("decode", index), "names a `recipe` or has a `decoder` of its own: give one of both"
            if len(entry.sweep) > 1:
                yield (
                    ("decode", index, "sweep"),
                    f"one option takes several values, here are {len(entry.sweep)} options",
                )
            for knob, values in entry.sweep.items():
                if not values:
                    yield ("decode", index, "sweep", knob), "is empty"

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.report.folder or Path("reports") / self.name)

    @property
    def resolved(self) -> dict[str, Any]:
        """Plain data of the settings, defaults included."""
        names = ("suite", "policy", "data", "decode", "sampling", "engine", "completions", "report", "seed", "verify")
        return self.plain(*names)


class Variant(NamedTuple):
    """A decoder at one strength."""

    method: str
    knob: str | None  # the option that is swept
    value: Any  # that it has here
    decoder: Part | None  # None: plain samples

    @property
    def label(self) -> str:
        """``blockwise_cd, branch 8``."""
        return self.method if self.knob is None else f"{self.method}, {self.knob} {written(self.value)}"


def written(value: Any) -> str:
    """A value as in the suite."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_suite(path: Path, overrides: Overrides = ()) -> tuple[DecodeSuite, list[Variant]]:
    """The suite in a YAML file and what it measures, plain samples first.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    suite = load_as(DecodeSuite, path, overrides)
    document = read_document(path, overrides)
    variants, problems = [Variant(PLAIN, None, None, None)], []
    for index, entry in enumerate(suite.decode):
        earlier = {variant.method for variant in variants}
        for knob, value in _settings(entry):
            try:
                variants.append(_variant(suite, document, path, index, knob, value))
            except RecipeError as error:
                problems += error.problems
        if variants[-1].method in earlier and not problems:
            message = f"an earlier entry is called {variants[-1].method!r} too: give this one a `name`"
            problems.append(document.problem(("decode", index), message))
    if problems:
        raise RecipeError(dict.fromkeys(problems))
    return suite, variants


def _settings(entry: Decoding) -> list[tuple[str | None, Any]]:
    """The option that is swept with each of its values; one of none where nothing is."""
    return [(knob, value) for knob, values in entry.sweep.items() for value in values] or [(None, None)]


def _variant(suite: DecodeSuite, document: Document, path: Path, index: int, knob: str | None, value: Any) -> Variant:
    entry, place = suite.decode[index], ("decode", index)
    if entry.recipe is not None:
        file = find(entry.recipe, path.parent)
        if file is None or not file.is_file():
            raise RecipeError(document.problem((*place, "recipe"), f"there is no file {entry.recipe!r}"))
        override = [] if knob is None else [f"--decoder.{knob}={json.dumps(value)}"]
        decoder, default = load_as(DecodeRecipe, file, override).decoder, file.stem
        if decoder is None:
            raise RecipeError(document.problem((*place, "recipe"), f"{file.name} has no decoder: it is plain samples"))
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
    """The mapping with a value somewhere inside."""
    if not steps:
        return value
    changed = copy.copy(data) if isinstance(data, dict) else {}
    changed[steps[0]] = _with(changed.get(steps[0]), steps[1:], value)
    return changed


def run_decode_suite(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the decode suite in a YAML file, prints its table, and returns the folder of its report.

    Raises:
        UserError: for what a person can mend.
    """
    suite, variants = read_suite(Path(path), overrides)
    from posttrain.reports.decoding import measure_all  # after loading: mistakes show at once

    try:
        return measure_all(suite, variants)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error
